"""Tests' way to the compiled kernels, which one device alone takes: here there are eight."""

import pytest

from moejax import cpu_kernels
from moejax.cpu_kernels import build


@pytest.fixture
def compiled(monkeypatch):
    """Programs that are traced in this test take them. Skipped where no compiler makes them."""
    if not build.load():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(cpu_kernels, "here", lambda: True)

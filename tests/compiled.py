"""Tests' way to the compiled kernels, which one device alone takes: here there are eight."""

import jax
import pytest

from moejax import cpu_kernels
from moejax.cpu_kernels import build


@pytest.fixture
def compiled(monkeypatch):
    """Programs that are traced in this test take them. Skipped where no compiler makes them."""
    monkeypatch.delenv(build.SWITCH, raising=False)
    if not build.load():
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(cpu_kernels, "here", lambda: True)
    jax.clear_caches()  # programs that were traced without them
    yield
    jax.clear_caches()


@pytest.fixture(params=["plain", "compiled"])
def either(request):
    """The test once without them and once with them."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")

"""Programs of this folder are compiled once, so none is kept on disk: writing them down takes time."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def nothing_is_kept():
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1e9)
    yield
    jax.config.update(name, before)

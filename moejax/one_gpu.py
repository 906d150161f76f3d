"""Whether a program that is traced here may use kernels for one GPU."""

import importlib.util

import jax


def has_tokamax() -> bool:
    """The only device is a GPU, and tokamax is installed (`pip install 'moejax[kernels]'`).

    Its kernels cannot be split over several devices, neither by the compiler nor inside `jax.shard_map`.
    """
    return (
        jax.default_backend() == "gpu"
        and jax.device_count() == 1
        and importlib.util.find_spec("tokamax") is not None
    )

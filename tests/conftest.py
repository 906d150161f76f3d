"""What makes silent mistakes impossible: 8 devices, no silent rank promotion, warnings are errors.

Must run before JAX initialises its backend, hence at import.
"""

import functools
import gc
import itertools
import os
import pathlib

from compile_flags import PLAIN

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices on two cores wait for each other; XLA aborts the process after 40 s, which a busy machine takes.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=8"
    + " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    + " --xla_cpu_parallel_codegen_split_count=1 "  # each worker of pytest-xdist has a core
    + PLAIN
).strip()
os.environ["MOEJAX_CACHE"] = (
    "off"  # commands in processes of their own leave the user's cache alone
)
# Nor do they compile kernels, each for itself; tests of these ask for them (compiled.py).
os.environ["MOEJAX_CPU_KERNELS"] = "off"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import jax
import pytest

from moejax.cost import hardware

jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of the time is LLVM's; the HLO, and so FLOPs, memory and collectives, stay what they are.
jax.config.update("jax_disable_most_optimizations", True)
_cache = pathlib.Path(__file__).parent.parent / ".jax_cache"
# Each pytest-xdist worker has its own: an entry that another one is writing must not be read.
_worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
jax.config.update("jax_compilation_cache_dir", str(_cache / jax.__version__ / _worker))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


# A run measures the machine as it begins, which takes as long as a tiny model's training: once for all here.
hardware.matmul_peak = functools.cache(hardware.matmul_peak)
hardware.copy_bandwidth = functools.cache(hardware.copy_bandwidth)


@pytest.fixture
def key():
    return jax.random.key(0)


_tests = itertools.count(1)
_MAPPINGS = pathlib.Path("/proc/self/maps")  # Linux has it


def pytest_runtest_teardown():
    """Lets compiled programs go before they fill the process's table of memory mappings.

    Linux allows a process 65,530 of them (vm.max_map_count); at that limit LLVM crashes. A test of a mesh
    adds over a thousand.
    """
    if next(_tests) % 10 or not _MAPPINGS.exists():
        return
    with _MAPPINGS.open("rb") as f:
        mappings = sum(1 for _ in f)
    if mappings > 20_000:
        jax.clear_caches()
        gc.collect()

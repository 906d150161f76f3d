"""Compiles kernels.cc for this processor, once, and registers its custom calls with XLA."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings

import jax

from moejax import user_cache

SWITCH = "MOEJAX_CPU_KERNELS"
COMPILERS = ("g++", "clang++")
CALLS = ("grouped", "grouped_transposed", "outer")
_SOURCE = pathlib.Path(__file__).with_name("kernels.cc")


@functools.cache
def load() -> bool:
    """Whether the custom calls are registered: compiles them if that has not been done for this processor.

    False without a compiler, and where MOEJAX_CPU_KERNELS is 'off'. A compiler that fails is warned about. The
    library lies in the user's cache (`user_cache`), or where there is none is made for this process alone.
    """
    if user_cache.switched_off(SWITCH):
        return False
    compiler = _compiler()
    if compiler is None:
        return False
    try:
        name = f"{_key(compiler)}.so"
        folder = user_cache.place("cpu_kernels")
        if folder is not None:
            _from_cache(compiler, folder / name)
        else:
            with tempfile.TemporaryDirectory() as made:
                _make(compiler, pathlib.Path(made) / name)
                _register(pathlib.Path(made) / name)  # stays mapped when the file is gone
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        warnings.warn(
            f"kernels for this processor: {' '.join(compiler)} failed, so XLA's code is used, which is slower "
            f"({SWITCH}=off stops this message): {said[0] if said else error}",
            stacklevel=2,
        )
        return False
    return True


def _compiler() -> list[str] | None:
    """The command of a C++ compiler: of the environment's CXX, or one of COMPILERS that is installed."""
    if said := shlex.split(os.environ.get("CXX", "")):
        return said
    found = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    return [found] if found else None


def _flags() -> list[str]:
    this = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    return ["-std=c++17", "-O3", this, "-ffp-contract=fast", "-DNDEBUG", "-shared", "-fPIC"]


def _key(compiler: list[str]) -> str:
    """Of all that the library depends on, the processor included."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        processor = platform.processor()
    sources = [path.read_text() for path in sorted(_SOURCE.parent.glob("*.[ch]*"))]
    parts = (*sources, *compiler, *_flags(), version.stdout, jax.lib.__version__, processor)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _from_cache(compiler: list[str], library: pathlib.Path) -> None:
    """Registers the library, which is made if it is not there or cannot be loaded."""
    if library.exists():
        try:
            return _register(library)
        except OSError:  # a full disk or another machine left something else there
            library.unlink(missing_ok=True)
    _make(compiler, library)
    _register(library)


def _make(compiler: list[str], library: pathlib.Path) -> None:
    """Another process may be at it: each writes a file of its own, and the last one stays."""
    print("compiling kernels for this processor (once, some seconds)", file=sys.stderr)
    part = library.with_suffix(f".{os.getpid()}.part")
    command = [*compiler, *_flags(), "-isystem", jax.ffi.include_dir(), str(_SOURCE)]
    try:
        subprocess.run(
            [*command, "-o", str(part)], check=True, capture_output=True, text=True, timeout=600
        )
        part.replace(library)
    finally:
        part.unlink(missing_ok=True)


def _register(library: pathlib.Path) -> None:
    calls = ctypes.CDLL(str(library))
    for name in CALLS:
        capsule = jax.ffi.pycapsule(getattr(calls, f"moejax_{name}"))
        jax.ffi.register_ffi_target(f"moejax_{name}", capsule, platform="cpu")

"""What the benchmarks share: side-by-side timing, the machine's matmul peak, allocator, tables and
JSON."""

import json
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# glibc returns large buffers to the system when they are freed, and XLA:CPU asks for new ones in
# every step: the kernel then clears and maps them page by page, which can cost as much as the step.
# Huge pages make that 512 times fewer faults; the other two keep buffers of up to 32 MiB in the
# process.
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=33554432:"
    "glibc.malloc.trim_threshold=1099511627776"
)


def use_huge_pages() -> None:
    """Start this process again with ALLOCATOR (glibc reads it at start only), unless GLIBC_TUNABLES
    is set already; set it to '' to measure with the system's defaults."""
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.argv])


def select_platform(name: str) -> None:
    """'cpu', 'gpu' or 'tpu'; an error if JAX has no such device here."""
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    jax.devices()


def describe_machine() -> str:
    device = jax.devices()[0]
    cores = f", {len(os.sched_getaffinity(0))} cores" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, JAX {jax.__version__}"


def side_by_side(functions: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each function, measured in turns: a machine that slows down slows all of
    them.

    Functions take no arguments and return arrays; the first call of each (compilation) is not
    counted.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def matmul(size: int, dtype: Any) -> tuple[Callable[[], jax.Array], float]:
    """A square matmul to compare with, and its FLOPs."""
    a = jnp.full((size, size), 0.5, dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a), 2.0 * size**3


def temporary_bytes(function: Callable, *args: Any) -> int:
    """Temporary memory of the compiled function, by XLA's own count."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def report(title: str, rows: Sequence[Mapping[str, Any]], output: str) -> None:
    """Print rows (dicts with the same keys) as a Markdown table; write them as JSON if `output` is
    set."""
    columns = list(rows[0])
    table = [columns, ["---"] * len(columns), *([str(r[c]) for c in columns] for r in rows)]
    print(f"\n{title} ({describe_machine()})\n")
    print("\n".join("| " + " | ".join(line) + " |" for line in table), flush=True)
    if output:
        result = {"title": title, "machine": describe_machine(), "rows": list(rows)}
        path = pathlib.Path(output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")

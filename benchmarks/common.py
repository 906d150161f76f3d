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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# glibc gives every buffer of more than 32 MiB back to the system when it is freed, and XLA:CPU asks for one
# of up to a gigabyte in every step: the kernel then clears and maps it page by page. These settings take
# all memory from one heap that is never given back, in huge pages.
ALLOCATOR = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.arena_max=1:"
    "glibc.malloc.trim_threshold=1099511627776"
)


def use_huge_pages() -> None:
    """Start this process again with ALLOCATOR (glibc reads it at start only), unless GLIBC_TUNABLES
    is set already; set it to '' to measure with the system's defaults."""
    if platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def select_platform(name: str) -> None:
    """'cpu', 'gpu' or 'tpu'; an error if JAX has no such device here."""
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(name, name))
    jax.devices()


def describe_machine() -> str:
    device = jax.devices()[0]
    cores = f", {len(os.sched_getaffinity(0))} cores" if device.platform == "cpu" else ""
    return f"{device.device_kind}{cores}, JAX {jax.__version__}"


class Timer(NamedTuple):
    """Something that times itself: `run` returns (wall clock, processor) seconds of one turn."""

    run: Callable[[], tuple[float, float]]


class Seconds(NamedTuple):
    """Medians over the turns. `cpu` is the processor time of the whole process, over its threads: on a
    machine that others use too it says more than the wall clock."""

    wall: float
    cpu: float


def side_by_side(
    functions: Mapping[str, Callable[[], Any] | Timer], repeats: int
) -> dict[str, Seconds]:
    """Median seconds of each function, measured in turns: a machine that slows down slows all of
    them.

    Functions take no arguments and return arrays; the first call of each (compilation) is not
    counted.
    """
    timers = {n: f.run if isinstance(f, Timer) else _timed(f) for n, f in functions.items()}
    for run in timers.values():
        run()
    seconds = {n: [timers[n]()] for n in timers}
    for _ in range(repeats - 1):
        for name, run in timers.items():
            seconds[name].append(run())
    return {n: Seconds(*map(statistics.median, zip(*s))) for n, s in seconds.items()}


def _timed(function):
    def run():
        wall, cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(function())
        return time.perf_counter() - wall, time.process_time() - cpu

    return run


def matmul(size: int, dtype: Any) -> tuple[Callable[[], jax.Array], float]:
    """A square matmul to compare with, and its FLOPs."""
    # Random: a GPU multiplies constants faster.
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a), 2.0 * size**3


def temporary_bytes(function: Callable, *args: Any) -> int:
    """Temporary memory of the compiled function, by XLA's own count."""
    return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes


def row(
    benchmark: str, measured: float, goal: float | None, detail: str = "", *, least: bool = False
) -> dict:
    """A line of the table. `goal` is the largest value that meets it, with `least` the smallest; None: no
    goal, for orientation."""
    met = goal is not None and (measured >= goal if least else measured <= goal)
    return {
        "benchmark": benchmark,
        "goal": "" if goal is None else f"{'≥' if least else '≤'} {goal:g}",
        "measured": float(f"{measured:.3g}"),
        "result": "" if goal is None else ("ok" if met else "missed"),
        "detail": detail,
    }


def less(long: Seconds, short: Seconds) -> Seconds:
    return Seconds(*(a - b for a, b in zip(long, short)))


def beside(what: str, tokens: int, seconds: dict, goal: float) -> dict:
    """moejax against the fastest of the others, in tokens per second."""
    ours = seconds["moejax"]
    wall, cpu = (min(s[k] for n, s in seconds.items() if n != "moejax") / ours[k] for k in (0, 1))
    speeds = ", ".join(f"{n} {tokens / s.wall:.0f}" for n, s in seconds.items())
    return row(what, wall, goal, f"tokens/s: {speeds}; by CPU time {cpu:.2f}", least=True)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows (dicts with the same keys) as a Markdown table."""
    columns = list(rows[0])
    table = [columns, ["---"] * len(columns), *([str(r[c]) for c in columns] for r in rows)]
    print("\n".join("| " + " | ".join(line) + " |" for line in table), flush=True)


def write_json(output: str, value: Any) -> None:
    path = pathlib.Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")


def report(title: str, rows: Sequence[Mapping[str, Any]], output: str) -> None:
    """Print rows as a table; write them as JSON if `output` is set."""
    print(f"\n{title} ({describe_machine()})\n")
    print_table(rows)
    if output:
        result = {"title": title, "machine": describe_machine(), "rows": list(rows)}
        write_json(output, result)

"""How long JAX traced and compiled, so that speeds can be told without it."""

import contextlib
from collections.abc import Callable, Iterator

from jax import monitoring


@contextlib.contextmanager
def compile_seconds() -> Iterator[Callable[[], float]]:
    """Gives a function that says how many seconds of wall time JAX has traced, lowered and compiled (or read
    compiled programs from disk) since the `with` began. Programs compiled at the same time count once."""
    spans: list[tuple[float, float]] = []

    def note(event: str, start: float, end: float, **_) -> None:
        if event.startswith("/jax/core/compile/"):
            spans.append((start, end))

    monitoring.register_event_time_span_listener(note)
    try:
        yield lambda: union(spans)
    finally:
        monitoring.unregister_event_time_span_listener(note)


def union(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals; tracing one function traces those that it calls."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total

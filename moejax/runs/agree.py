"""What several processes must know of each other before they go on: that none of them failed."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from moejax.config import ConfigError

_TEXT_BYTES = 1024


def first_error(error: Exception | None) -> str | None:
    """The error of the first process that has one, as text, in every process; all must ask together."""
    if jax.process_count() == 1:
        return None if error is None else str(error)
    text = b"" if error is None else (str(error) or type(error).__name__).encode()[:_TEXT_BYTES]
    row = np.frombuffer(text.ljust(_TEXT_BYTES, b"\0"), np.uint8)
    for number, other in enumerate(multihost_utils.process_allgather(row)):
        if other.any():
            return f"process {number}: {other.tobytes().rstrip(bytes(1)).decode(errors='replace')}"
    return None


def raise_together(error: Exception | None) -> None:
    """Raise this process's error, or else ConfigError with that of another process."""
    text = first_error(error)
    if error is not None:
        raise error
    if text is not None:
        raise ConfigError(text)


def of_first(values: list[int]) -> list[int]:
    """Process 0's list of numbers, in every process."""
    if jax.process_count() == 1:
        return values
    many = 4096  # steps in one folder; the newest of them, if there are more
    row = np.full(many, -1, np.int32)
    row[: len(values[:many])] = values[:many]
    return [int(v) for v in multihost_utils.broadcast_one_to_all(row) if v >= 0]

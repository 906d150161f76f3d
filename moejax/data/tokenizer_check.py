"""Tries out a tokenizer.json from strangers before it is used."""

from moejax import limited
from moejax.config import ConfigError
from moejax.data import tokenizer_probe
from moejax.data.sources import DataError

# 250,000 tokens and as many merges (12 MB) take 2 s and 350 MB; published ones have up to 40 MB.
SECONDS, MEGABYTES = 60, 4096


def check_tokenizer(text: str, name: str) -> None:
    """Try a tokenizer.json in a separate process. Raises DataError if the library cannot read it, or crashes,
    hangs or takes all memory with it."""
    program, data = tokenizer_probe.__file__, text.encode()
    try:
        limited.run(program, data, "trying it", seconds=SECONDS, megabytes=MEGABYTES)
    except ConfigError as e:
        raise DataError(
            f"{name}: not a tokenizer.json that the `tokenizers` library can use ({e})"
        ) from e

"""Which tokens stand before and after a document, and pad a row.

An imported model's files say it (`moejax.interop.prompts.separators`), and a run keeps that in separators.json
beside its tokenizer.json. Of any other tokenizer.json they are found by published names.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moejax.data.sources import DataError
from moejax.text import cut

FILE_NAME = "separators.json"
SEPARATOR, PADDING = "<|endoftext|>", "<|pad|>"
_BOS_NAMES = (
    "<｜begin▁of▁sentence｜>",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<s>",
    "<bos>",
    "[BOS]",
)
_EOS_NAMES = (
    *("<｜end▁of▁sentence｜>", "<|end_of_text|>", SEPARATOR, "</s>", "<eos>", "[EOS]"),
    *("<|return|>", "<|im_end|>"),
)
_PAD_NAMES = (PADDING, "<pad>", "[PAD]", "<|padding|>", "<|PAD_TOKEN|>", "<｜▁pad▁｜>")


class Separators(NamedTuple):
    """Token ids; bos and eos may be the same."""

    bos_id: int
    eos_id: int
    pad_id: int

    def to_json(self) -> bytes:
        return (json.dumps(self._asdict()) + "\n").encode()


def by_names(special: Mapping[str, int], name: str) -> Separators:
    """Those whose names are known, among the special tokens (text -> id) of the tokenizer `name`.

    Raises DataError if none ends a document.
    """
    eos = _first(_EOS_NAMES, special)
    if eos is None:
        raise DataError(
            f"{name}: no special token ends a document; its special tokens are "
            f"{cut(', '.join(special), 400) or 'none'}, known names are {', '.join(_EOS_NAMES)}"
        )
    bos, pad = (_first(names, special) for names in (_BOS_NAMES, _PAD_NAMES))
    return Separators(eos if bos is None else bos, eos, eos if pad is None else pad)


def _first(names: Iterable[str], special: Mapping[str, int]) -> int | None:
    return next((special[n] for n in names if n in special), None)


def read_separators(beside: pathlib.Path) -> Separators | None:
    """What a run's folder says beside its tokenizer.json; None if it says nothing. Raises DataError."""
    path = beside.with_name(FILE_NAME)
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        raise DataError(f"{path} cannot be read: {str(e)[:100]}") from e
    good = isinstance(values, dict) and values.keys() == {*Separators._fields}
    if not good or not all(type(v) is int and v >= 0 for v in values.values()):
        raise DataError(f"{path} must hold {', '.join(Separators._fields)}, each a token id")
    return Separators(**values)

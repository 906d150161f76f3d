"""Options: fields of frozen dataclasses with their default, their range and their choices in one place.

    d_model: int = number(128, least=1)
    norm: str = choice("rmsnorm", "layernorm")  # the first is the default

`problems` finds every value out of its range in a dataclass and the dataclasses in it, as sentences.
"""

import dataclasses
import difflib
import math
from collections.abc import Iterable
from typing import Any

from moejax.text import MOST_MESSAGE, cut, plain


class ConfigError(ValueError):
    """Input that cannot work; the message names the culprit and what would work.

    A message may quote files and flags: it is made safe to print, and short.
    """

    def __init__(self, message: str):
        super().__init__(plain(cut(message, MOST_MESSAGE)))


def number(
    default: float,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field that holds a number between these bounds: `least` and `most` are allowed, `above` and `below`
    are not."""
    bounds = {"least": least, "above": above, "most": most, "below": below}
    return dataclasses.field(default=default, metadata={"bounds": bounds})


def choice(*choices: str) -> Any:
    """A field that holds one of `choices`; the first of them is the default."""
    return dataclasses.field(default=choices[0], metadata={"choices": choices})


def choices_of(cls: type, name: str) -> tuple[str, ...]:
    """The choices of one field of a dataclass."""
    return cls.__dataclass_fields__[name].metadata["choices"]


def problems(cfg: Any, prefix: str = "") -> list[str]:
    """A sentence for every value of a dataclass that its field does not allow."""
    out = []
    for field in dataclasses.fields(cfg):
        value, key = getattr(cfg, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            out += problems(value, key + ".")
        elif "choices" in field.metadata:
            p = choice_problem(key, value, field.metadata["choices"])
            out += [p] if p else []
        elif "bounds" in field.metadata and not _inside(value, **field.metadata["bounds"]):
            out.append(f"{key}={value} must be {bounds_text(**field.metadata['bounds'])}")
    return out


def _inside(value, least, above, most, below) -> bool:
    return (
        (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
        and (below is None or value < below)
    )


def bounds_text(least, above, most, below) -> str:
    """'at least 0 and below 1', 'between 1 and 8'."""
    if least is not None and most is not None:
        return f"between {least} and {most}"
    words = {"at least": least, "above": above, "at most": most, "below": below}
    return " and ".join(f"{word} {bound}" for word, bound in words.items() if bound is not None)


def choice_problem(key: str, value: str, choices: Iterable[str]) -> str | None:
    """None if `value` is one of `choices`, else a sentence with the nearest and all of them."""
    choices = tuple(choices)
    if value in choices:
        return None
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{key}={value!r}: {hint}choices are {', '.join(choices)}"


def divisors_text(n: int) -> str:
    """'1, 2, 4 or 8' for 8, for error messages."""
    if n < 1:
        return "none"
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    ds = [str(i) for i in sorted({*small, *(n // i for i in small)})]
    return ds[0] if len(ds) == 1 else ", ".join(ds[:-1]) + f" or {ds[-1]}"


class Problems(list[str]):
    """Sentences about what does not fit together; `need` adds one unless its condition holds."""

    def need(self, ok: bool, text: str) -> None:
        if not ok:
            self.append(text)

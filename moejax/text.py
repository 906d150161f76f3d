"""Numbers as people read them, tables as text, Markdown, CSV and JSON, and foreign text in messages."""

import csv
import dataclasses
import io
import json
import re
import reprlib
from collections.abc import Sequence

FORMATS = ("table", "markdown", "csv", "json")
UNKNOWN = "unknown"
# What a terminal acts on, or shows in another place: control characters but tab and newline, marks that turn
# the direction of writing, halves of surrogate pairs.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
MOST_SHOWN, MOST_MESSAGE = 120, 8000  # characters of a value in a message, and of a message


class Number(str):
    """A number as people read it; `exact` is the number itself, which CSV and JSON have instead."""

    exact: float | None

    def __new__(cls, text: str, exact: float | None) -> "Number":
        self = super().__new__(cls, text)
        self.exact = exact
        return self


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, column names, rows of texts (of numbers: `Number`), and a note below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def render(tables: Sequence[Table], style: str = "table") -> str:
    """All tables in one style of FORMATS."""
    if style == "json":
        return json.dumps([_data(t) for t in tables], indent=1)
    if style not in FORMATS:
        raise ValueError(f"format {style!r}: expected one of {', '.join(FORMATS)}")
    one = {"table": _text, "markdown": _markdown, "csv": _csv}[style]
    return "\n".join(one(t) for t in tables)


def _text(t: Table) -> str:
    rows = [list(t.header), *[list(r) for r in t.rows]]
    widths = [max(len(r[i]) for r in rows) for i in range(len(t.header))]
    right = [_numeric([r[i] for r in t.rows]) for i in range(len(t.header))]

    def line(row):
        cells = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right)]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * w for w in widths)
    body = [line(t.header), rule, *[line(r) for r in t.rows]]
    return "\n".join([*([t.title] if t.title else []), *body, *([t.note] if t.note else []), ""])


def _markdown(t: Table) -> str:
    right = [_numeric([r[i] for r in t.rows]) for i in range(len(t.header))]
    escape = lambda row: [c.replace("|", "\\|") for c in row]  # noqa: E731
    lines = [
        "| " + " | ".join(escape(t.header)) + " |",
        "|" + "|".join("--:" if r else ":--" for r in right) + "|",
        *["| " + " | ".join(escape(row)) + " |" for row in t.rows],
    ]
    head = [f"**{t.title}**", ""] if t.title else []
    return "\n".join([*head, *lines, *(["", t.note] if t.note else []), ""])


def _csv(t: Table) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(t.header)
    writer.writerows([_exact(c) for c in row] for row in t.rows)
    return out.getvalue()


def _data(t: Table) -> dict:
    rows = [[_exact(c) for c in row] for row in t.rows]
    return {"title": t.title, "header": list(t.header), "rows": rows, "note": t.note}


def _exact(cell: str) -> float | str | None:
    value = cell.exact if isinstance(cell, Number) else cell
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _numeric(cells: Sequence[str]) -> bool:
    """A column of short numbers is aligned right; words such as 'undisclosed' do not count."""
    if max(map(len, cells), default=0) > 14:
        return False
    digits = [c[:1].isdigit() or c[:1] in "$-<" for c in cells if c and not c[0].isalpha()]
    return bool(digits) and all(digits) and sum(c[:1].isalpha() for c in cells) < len(cells)


def count_text(n: float | None) -> Number:
    """16.38B, 2.83B, 124.4M; four significant digits."""
    return _scaled(n, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")))


def flops_text(n: float | None) -> Number:
    return _scaled(n, ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")))


def bytes_text(n: float | None) -> Number:
    """Binary units: 30.5 GiB, 896 MiB."""
    return _scaled(
        n, ((2**40, " TiB"), (2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"), (1, " B"))
    )


def usd_text(n: float | None) -> Number:
    text = _scaled(n, ((1e9, "B"), (1e6, "M"), (1e3, "K"), (1, "")))
    return text if n is None else Number(f"${text}", n)


def seconds_text(s: float | None) -> Number:
    return Number(_seconds(s), s)


def _seconds(s: float | None) -> str:
    if s is None:
        return UNKNOWN
    if s < 1e-3:
        return f"{s * 1e6:.3g} us"
    if s < 1:
        return f"{s * 1e3:.3g} ms"
    for size, unit in ((86400.0, "days"), (3600.0, "h")):
        if s >= 2 * size:
            return f"{s / size:.4g} {unit}"
    return f"{s:.4g} s"


def _scaled(n: float | None, units) -> Number:
    if n is None:
        return Number(UNKNOWN, None)
    for size, unit in units:
        if abs(n) >= size:
            value = n / size
            text = f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
            return Number(text + unit, n)
    return Number(f"{n:.4g}", n)


class _Short(reprlib.Repr):
    """`repr` of a bounded part of a value."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, MOST_SHOWN, MOST_SHOWN
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 6

    def repr_int(self, x, level):
        return f"{x:#x}"[:20] + "..." if x.bit_length() > 4 * MOST_SHOWN else repr(x)


def shown(value) -> str:
    """A value from a file, for a message: its `repr` without what a terminal acts on, in bounded length."""
    return cut(plain(_Short().repr(value)), MOST_SHOWN)


def plain(text: str) -> str:
    """The text with every character that a terminal would act on written out: `\\x1b`."""
    return _UNPRINTABLE.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def cut(text: str, most: int) -> str:
    """At most `most` characters: what is too long loses its middle."""
    half = most // 2 - 3
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"

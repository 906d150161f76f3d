"""Numbers as people read them, and tables as terminal text, Markdown and CSV."""

import csv
import dataclasses
import io
from collections.abc import Sequence

FORMATS = ("table", "markdown", "csv")
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Table:
    """A title, column names, rows of texts, and a note below."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def render(tables: Sequence[Table], style: str = "table") -> str:
    """All tables in one style of FORMATS."""
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
    writer.writerows(t.rows)
    return out.getvalue()


def _numeric(cells: Sequence[str]) -> bool:
    """A column of short numbers is aligned right; words such as 'undisclosed' do not count."""
    if max(map(len, cells), default=0) > 14:
        return False
    digits = [c[:1].isdigit() or c[:1] in "$-<" for c in cells if c and not c[0].isalpha()]
    return bool(digits) and all(digits) and sum(c[:1].isalpha() for c in cells) < len(cells)


def count_text(n: float | None) -> str:
    """16.38B, 2.83B, 124.4M; four significant digits."""
    return _scaled(n, ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")))


def flops_text(n: float | None) -> str:
    return _scaled(n, ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")))


def bytes_text(n: float | None) -> str:
    """Binary units: 30.5 GiB, 896 MiB."""
    return _scaled(
        n, ((2**40, " TiB"), (2**30, " GiB"), (2**20, " MiB"), (2**10, " KiB"), (1, " B"))
    )


def usd_text(n: float | None) -> str:
    return UNKNOWN if n is None else f"${_scaled(n, ((1e9, 'B'), (1e6, 'M'), (1e3, 'K'), (1, '')))}"


def seconds_text(s: float | None) -> str:
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


def _scaled(n, units) -> str:
    if n is None:
        return UNKNOWN
    for size, unit in units:
        if abs(n) >= size:
            value = n / size
            text = f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
            return text + unit
    return f"{n:.4g}"

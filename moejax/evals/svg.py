"""Charts of lines as SVG text: no fonts, scripts or files from elsewhere, and none of matplotlib's weight.

Lines differ in colour (Okabe and Ito's, which the colour-blind tell apart) and in dashes, which print keeps.
"""

import dataclasses
import html
import math
from collections.abc import Callable, Sequence

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
DASHES = ("", "7 3", "2 3", "9 3 2 3")
WIDTH, HEIGHT = 520, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 30, 44


@dataclasses.dataclass(frozen=True)
class Line:
    """A line with an optional band around it; points that are not finite are left out.

    Attributes:
      name: in the legend; lines of one name have one colour, and one entry.
      x, y: the points.
      low, high: the band, at every x.
      thin: drawn thinly, with a cross at its end: a run that broke off.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    thin: bool = False


def chart(
    title: str,
    x_label: str,
    y_label: str,
    lines: Sequence[Line],
    x_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """One chart, WIDTH by HEIGHT. `x_text` writes a number of the x axis."""
    every = [p for line in lines for p in _points(line.x, line.y)]
    every += [p for line in lines for ends in (line.low, line.high) for p in _points(line.x, ends)]
    x0, x1 = _range([p[0] for p in every])
    y0, y1 = _range([p[1] for p in every])
    across, down = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def at(x: float, y: float) -> str:
        px, py = _LEFT + (x - x0) / (x1 - x0) * across, _TOP + (y1 - y) / (y1 - y0) * down
        return f"{px:.1f},{py:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="#1d2430">',
        f"<title>{html.escape(title)}</title>",
        _label(_LEFT, 16, title, "start", 13),
        _label(_LEFT + across / 2, HEIGHT - 6, x_label, "middle"),
        f'<g transform="translate(14 {_TOP + down / 2:g}) rotate(-90)">{_label(0, 0, y_label, "middle")}</g>',
    ]
    for y in ticks(y0, y1):
        left, right = at(x0, y), at(x1, y)
        parts.append(f'<path d="M{left}L{right}" stroke="#dfe3e8"/>')
        parts.append(_label(_LEFT - 6, float(left.split(",")[1]) + 4, f"{y:g}", "end"))
    for x in ticks(x0, x1):
        place = float(at(x, y0).split(",")[0])
        parts.append(_label(place, HEIGHT - _BOTTOM + 18, x_text(x), "middle"))
    parts.append(
        f'<path d="M{at(x0, y1)}L{at(x0, y0)}L{at(x1, y0)}" fill="none" stroke="#5b6770"/>'
    )
    names = list(dict.fromkeys(line.name for line in lines))
    for line in lines:
        style = _style(names.index(line.name))
        if line.low:
            edge = [*_points(line.x, line.low), *reversed(_points(line.x, line.high))]
            path = "L".join(at(*p) for p in edge)
            parts.append(f'<path d="M{path}Z" fill="{style[0]}" fill-opacity="0.15"/>')
        parts += _drawn([at(*p) for p in _points(line.x, line.y)], style, line.thin)
    parts += _legend(names, _LEFT + across - 4)
    return "\n".join([*parts, "</svg>"])


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within low and high, about so many."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]


def _points(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    return [(a, b) for a, b in zip(x, y) if math.isfinite(a) and math.isfinite(b)]


def _range(values: list[float]) -> tuple[float, float]:
    """The least and greatest value, a little apart."""
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _style(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], DASHES[number % len(DASHES)]


def _drawn(places: list[str], style: tuple[str, str], thin: bool) -> list[str]:
    colour, dash = style
    if not places:
        return []
    stroke = f'stroke="{colour}" stroke-dasharray="{dash}"'
    out = [
        f'<path d="M{"L".join(places)}" fill="none" {stroke} stroke-width="{1 if thin else 2}" '
        'stroke-linejoin="round"/>'
    ]
    if thin:
        x, y = map(float, places[-1].split(","))
        cross = f"M{x - 4:g},{y - 4:g}l8,8m0,-8l-8,8"
        out.append(f'<path d="{cross}" stroke="{colour}" stroke-width="2"/>')
    elif len(places) <= 12:
        out += [
            f'<circle cx="{x}" cy="{y}" r="2.6" fill="{colour}"/>'
            for x, y in (p.split(",") for p in places)
        ]
    return out


def _legend(names: list[str], right: float) -> list[str]:
    if len(names) < 2:
        return []
    out = []
    for number, name in enumerate(names):
        colour, dash = _style(number)
        y = _TOP + 8 + 16 * number
        line = f"M{right - 28:g},{y}h28"
        out.append(
            f'<path d="{line}" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>'
        )
        out.append(_label(right - 34, y + 4, name, "end"))
    return out


def _label(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{html.escape(text)}</text>'

"""Charts of curves: where points go, what is left out, what looks alike, and that names break nothing."""

import re
import xml.etree.ElementTree as ET

import pytest

from moejax.evals.charts import CURVE_COLOURS, DASHES, Curve, curves

SVG = "{http://www.w3.org/2000/svg}"


def drawn(text, **style):
    """(path, style) of those whose style has these values, in drawing order; markers' shapes left out."""
    out = []
    for path in ET.fromstring(text).iter(f"{SVG}path"):
        has = dict(re.findall(r"([\w-]+): ([^;]+)", path.get("style", "")))
        shape = path.get("d", "")
        if all(has.get(k) == v for k, v in style.items()) and "-" not in shape:
            out.append((shape, has))
    return out


def points(path):
    return [tuple(map(float, p)) for p in re.findall(r"[ML] (\S+) (\S+)", path)]


def test_points_lie_where_they_should():
    """Along a straight line, and larger is higher, which in SVG is a smaller number."""
    text = curves("t", "x", "y", [Curve("a", [0, 50, 100], [1, 2, 3])])
    (line, *_) = [p for p, s in drawn(text, stroke=CURVE_COLOURS[0]) if len(points(p)) == 3]
    (x0, y0), (x1, y1), (x2, y2) = points(line)
    assert x0 < x1 < x2 and y0 > y1 > y2
    # SVG numbers have six digits.
    assert x1 - x0 == pytest.approx(x2 - x1, rel=1e-4)
    assert y1 - y0 == pytest.approx(y2 - y1, rel=1e-4)


def test_what_is_not_finite_is_left_out():
    text = curves("t", "x", "y", [Curve("a", [0, 1, 2], [1.0, float("nan"), float("inf")])])
    assert "nan" not in text and ">inf" not in text
    ET.fromstring(curves("nothing", "x", "y", []))
    ET.fromstring(curves("one point", "x", "y", [Curve("a", [1], [1])]))


def test_curves_of_one_name_look_alike_and_of_two_do_not():
    long = list(range(20))
    given = [("a", long, False), ("b", [5] * 20, False), ("a", [9] * 20, True)]
    text = curves("t", "x", "y", [Curve(name, long, y, thin=thin) for name, y, thin in given])
    paths = [s for _, s in drawn(text, fill="none") if s.get("stroke") in CURVE_COLOURS[:2]]
    looks = [(s["stroke"], s.get("stroke-dasharray"), s.get("stroke-width", "1")) for s in paths]
    first, thin, second = looks[:3]  # 1 is the width of a path that says none
    assert first[0] == thin[0] != second[0] and first[1] == thin[1] != second[1]
    assert (first[2], thin[2]) == ("2", "1")
    assert len(re.findall(">a</text>", text)) == 1  # one entry in the legend
    looks = {(CURVE_COLOURS[i % len(CURVE_COLOURS)], DASHES[i % len(DASHES)]) for i in range(28)}
    assert len(looks) == 28


def test_a_band_goes_there_and_back():
    with_band = curves("t", "x", "y", [Curve("a", [0, 1], [1, 2], [0, 1], [2, 3])])
    without = curves("t", "x", "y", [Curve("a", [0, 1], [1, 2])])
    assert "fill-opacity: 0.15" in with_band and "fill-opacity: 0.15" not in without


def test_names_are_text_and_nothing_else():
    given = [Curve("<script>", [0], [0]), Curve("_b", [0], [1]), Curve("$x^$", [0], [2])]
    text = curves("<t>", "x&", '"y"', given)
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert "_b</text>" in text and "$x^$</text>" in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing from elsewhere
    ET.fromstring(text)

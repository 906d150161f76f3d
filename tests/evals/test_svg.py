"""Our charts: where points go, what is left out, and that names cannot break the page."""

import re
import xml.etree.ElementTree as ET

import pytest

from moejax.evals import svg
from moejax.evals.svg import COLOURS, DASHES, Line, chart, ticks


def paths(text, **attributes):
    tree = ET.fromstring(text)
    found = [p.attrib for p in tree.iter("{http://www.w3.org/2000/svg}path")]
    return [p for p in found if all(p.get(k) == v for k, v in attributes.items())]


def test_ticks_are_round_and_inside():
    assert ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(4.03, 4.61) == [4.2, 4.4, 4.6]
    assert ticks(-0.03, 0.02) == [-0.03, -0.02, -0.01, 0.0, 0.01, 0.02]
    assert ticks(0, 512) == [0, 200, 400]


def test_points_lie_where_they_should():
    # The range is 4% wider than the points on each side: a point at the least x is 4/108 of the way across.
    text = chart("t", "x", "y", [Line("a", [0, 100], [1, 3])])
    (line,) = paths(text, stroke=COLOURS[0], fill="none")
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in line["d"][1:].split("L"))
    across, down = svg.WIDTH - 62 - 14, svg.HEIGHT - 30 - 44
    assert x0 == pytest.approx(62 + across * 4 / 108, abs=0.06)
    assert x1 == pytest.approx(62 + across * 104 / 108, abs=0.06)
    assert y0 == pytest.approx(30 + down * 104 / 108, abs=0.06)  # larger is higher
    assert y1 == pytest.approx(30 + down * 4 / 108, abs=0.06)


def test_what_is_not_finite_is_left_out():
    text = chart("t", "x", "y", [Line("a", [0, 1, 2], [1.0, float("nan"), float("inf")])])
    assert "nan" not in text and "inf" not in text
    ET.fromstring(chart("nothing", "x", "y", []))
    ET.fromstring(chart("one point", "x", "y", [Line("a", [1], [1])]))


def test_lines_of_one_name_look_alike_and_of_two_do_not():
    lines = [Line("a", [0, 1], [0, 1]), Line("b", [0, 1], [1, 2]), Line("a", [0], [3], thin=True)]
    text = chart("t", "x", "y", lines)
    drawn = [p for p in paths(text, fill="none") if "stroke-dasharray" in p]
    looks = [(p["stroke"], p["stroke-dasharray"]) for p in drawn]
    assert looks[0] == looks[2] != looks[1]
    assert len(re.findall(">a</text>", text)) == 1  # one entry in the legend
    combined = {(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i in range(28)}
    assert len(combined) == 28


def test_a_band_goes_there_and_back():
    text = chart("t", "x", "y", [Line("a", [0, 1], [1, 2], [0, 1], [2, 3])])
    (band,) = [p for p in paths(text) if "fill-opacity" in p]
    assert band["d"].count("L") == 3 and band["d"].endswith("Z")


def test_names_are_escaped():
    text = chart("<t>", "x&", '"y"', [Line("<script>", [0], [0]), Line("b", [0], [1])])
    assert "<script>" not in text and "&lt;script&gt;" in text
    ET.fromstring(text)

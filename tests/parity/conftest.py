"""Comparisons with the original implementations; collected only where torch and transformers are.

`make parity` installs them (`requirements-parity.txt`) and ends with a table of the largest differences.
"""

import importlib.util
from collections import defaultdict

import pytest

if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    collect_ignore_glob = ["test_*.py"]


_largest = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[_largest] = defaultdict(lambda: defaultdict(float))


@pytest.fixture(scope="session")
def record(request):
    """`record(family, what, value)`: a number for the table; the largest of its kind is printed."""

    def one(family: str, what: str, value: float):
        table = request.config.stash[_largest]
        table[family][what] = max(table[family][what], float(value))

    return one


@pytest.fixture(scope="session")
def record_one(request):
    """`record_one(family, what)`: one more of something that was checked exactly."""

    def one(family: str, what: str, by: int = 1):
        request.config.stash[_largest][family][what] += by

    return one


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash[_largest]
    if not table:
        return
    write = terminalreporter.write_line
    terminalreporter.section("largest absolute difference to the original (float32)")
    kinds = [
        "configurations",
        "logits",
        "padded",
        "gradient",
        "balance loss",
        "router",
        "routes equal",
        "tokens equal",
    ]
    write("| family | " + " | ".join(kinds) + " |")
    write("|---" * (len(kinds) + 1) + "|")
    for family in sorted(table):
        cells = []
        for kind in kinds:
            value = table[family].get(kind)
            exact = kind in ("configurations", "routes equal", "tokens equal")
            cells.append("" if value is None else f"{value:.0f}" if exact else f"{value:.1e}")
        write(f"| {family} | " + " | ".join(cells) + " |")

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
        request.config.stash[_largest][family][what] += int(by)

    return one


# Of these the number counts, of the others the largest difference.
COUNTED = ("configurations", "routes equal", "tokens equal")


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands over what it has."""
    if hasattr(session.config, "workeroutput"):
        table = session.config.stash[_largest]
        session.config.workeroutput["largest"] = {family: dict(of) for family, of in table.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """The workers' tables as one."""
    table = node.config.stash[_largest]
    for family, of in getattr(node, "workeroutput", {}).get("largest", {}).items():
        for what, value in of.items():
            here = table[family]
            here[what] = here[what] + value if what in COUNTED else max(here[what], value)


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
            form = ".0f" if kind in COUNTED else ".1e"
            cells.append("" if value is None else f"{value:{form}}")
        write(f"| {family} | " + " | ".join(cells) + " |")

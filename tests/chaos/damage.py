"""What the campaigns share: one way to damage a file, chosen at random, and what they found."""

import json
import pathlib
import random

from tqdm import tqdm

KINDS = [
    *("flip", "zeros", "cut", "empty", "gone", "grow", "swap", "copy", "folder", "link"),
    *("json", "json", "json"),  # three times as often
]
VALUES = [
    *(None, True, -1, 0, 1, 10**30, 0.5, 1e308, "", "x", [], {}, [[]], "float64", "../../x"),
    *("\x1b[31m", "a\x00b", "\ud800", "\u202e", "x" * 10_000, [[[[[[]]]]]], {"a": {"b": {}}}),
]


class Found:
    """What a campaign of hours found, printed as it is found, below a bar where there is a terminal.

    Attributes:
      number: of things found.
    """

    def __init__(self, cases: int):
        self.number = 0
        self._bar = tqdm(total=cases, unit="case", disable=None)

    def say(self, line: str) -> None:
        self.number += 1
        tqdm.write(line)

    def advance(self, cases: int = 1) -> None:
        self._bar.update(cases)

    def end(self, line: str) -> int:
        """Prints the campaign's one line; returns the number of things found."""
        self._bar.close()
        print(line, flush=True)
        return self.number


def mutate(path: pathlib.Path, rng: random.Random) -> str:
    """Change one file in one way; returns which."""
    data = bytearray(path.read_bytes())
    at = rng.randrange(max(len(data), 1))
    kind = rng.choice(KINDS)
    if kind == "flip" and data:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    elif kind == "cut":
        del data[at:]
    elif kind == "empty":
        data = bytearray()
    elif kind == "grow":
        data += rng.randbytes(rng.randrange(1, 100))
    elif kind == "swap":  # two parts of the file change places
        data = data[at:] + data[:at]
    elif kind == "copy":  # another file of the same checkpoint
        others = sorted(p for p in path.parent.rglob("*") if p.is_file())
        data = bytearray(rng.choice(others).read_bytes())
    elif kind == "json":
        data = bytearray(_other_json(bytes(data), rng))
    if kind in ("gone", "folder", "link"):
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(path)
    else:
        path.write_bytes(data)
    return kind


def _other_json(data: bytes, rng: random.Random) -> bytes:
    """One value anywhere in a JSON file becomes another; other files get JSON that is none of theirs."""
    try:
        tree = json.loads(data)
    except ValueError:
        return json.dumps(rng.choice(VALUES)).encode()
    node, parent, key = tree, None, None
    while isinstance(node, dict | list) and node and (parent is None or rng.random() < 0.8):
        parent, key = node, rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        node = parent[key]
    if parent is None:
        tree = rng.choice(VALUES)
    elif isinstance(parent, dict) and rng.random() < 0.3:
        del parent[key]
    else:
        parent[key] = rng.choice(VALUES)  # pyright: ignore
    return json.dumps(tree).encode()

"""Writes odd corpora in every format and compression, damages half of them, and reads all.

    python tests/chaos/hostile_corpora.py --count=100

An undamaged one must give its texts, character for character; a damaged one some of them, or a message.
Prints one line; wrong texts, tracebacks, hangs and memory beyond 300 MB must be zero.
"""

import argparse
import bz2
import collections
import gzip
import json
import lzma
import pathlib
import random
import resource
import sys
import tempfile
import time

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from damage import Found, mutate

ROOT = pathlib.Path(__file__).parents[2]
SECONDS, MEGABYTES = 20, 300
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}
PIECES = [
    *("word ", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\t", "\ufeff", "\u200b", "\u202e"),
    *("é", "\u0301", '"', "\\", "\\n", "{", "]", ",", "<|endoftext|>"),
    *("\U0001f600", "\U0010ffff", "\uffff", "\x00", "\x1b[31m"),
]  # fmt: skip


def text(rng: random.Random, ends: bool) -> str:
    """A text of odd characters; `ends`: with ends of lines in it."""
    pieces = [*PIECES, "\n", "\r\n", "\r"] if ends else PIECES
    size = rng.choice((1, 3, 30, 300, 30_000))
    return "x" + "".join(rng.choices(pieces, k=size)) + "x"


def write(folder: pathlib.Path, rng: random.Random) -> tuple[pathlib.Path, list[str]]:
    """A file and the texts in it."""
    form = rng.choice(["jsonl", "array", "pretty", "parquet", "txt"])
    texts = [text(rng, ends=True) for _ in range(1 if form == "txt" else rng.choice((1, 7, 40)))]
    if form == "parquet":
        kind = rng.choice([pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
        path = folder / "x.parquet"
        column = pa.array(texts, pa.string()).cast(kind)
        pq.write_table(pa.table({"text": column}), path, row_group_size=rng.choice((1, 5, 100)))
        return path, texts
    ascii_ = rng.random() < 0.5
    if form == "txt":
        data, name = texts[0], "x.txt"
    elif form == "jsonl":
        lines = [json.dumps({"text": t}, ensure_ascii=ascii_) for t in texts]
        data, name = "\n".join([*lines, ""]), "x.jsonl"
    else:
        records = [{"n": i, "text": t} for i, t in enumerate(texts)]
        data = json.dumps(records, ensure_ascii=ascii_, indent=2 if form == "pretty" else None)
        name = "x.json"
    suffix = rng.choice(list(COMPRESS))
    path = folder / (name + suffix)
    path.write_bytes(COMPRESS[suffix](data.encode()))
    return path, texts


def peak_megabytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def text_of(document) -> str:
    """Of a document; raises what stands in its place."""
    if isinstance(document, Exception):
        raise document
    return document.text


def campaign(count: int, seed: int) -> int:
    from moejax.config import ConfigError
    from moejax.data.sources import read_documents

    rng, tally, found = random.Random(seed), collections.Counter(), Found(count)
    before = peak_megabytes()
    for number in range(count):
        found.advance()
        with tempfile.TemporaryDirectory() as name:
            path, texts = write(pathlib.Path(name), rng)
            kind = mutate(path, rng) if number % 2 else "whole"
            began, result, said = time.monotonic(), "", ""
            try:
                read = [text_of(d) for d in read_documents(str(path), "text", 0)]
                right = kind != "whole" or read == texts
                result = "read" if right else "WRONG"
                said = "" if right else f"{read[:1]!r:.200} for {texts[:1]!r:.200}"
            except ConfigError as e:
                result, said = ("refused" if kind != "whole" else "WRONG"), str(e)
            except Exception as e:
                result, said = "TRACEBACK", f"{type(e).__name__}: {e}"[:300]
            if time.monotonic() - began > SECONDS:
                result, said = "HANG", f"{time.monotonic() - began:.0f} s"
            tally[result] += 1
            if result.isupper():
                found.say(f"corpus {number}, {path.name}, {kind}: {result} {said}")
    peak = peak_megabytes() - before
    if peak > MEGABYTES:
        found.say(f"{peak} MB of memory")
    return found.end(
        f"{count} corpora: {tally['read']} read, {tally['refused']} refused; wrong texts {tally['WRONG']}, "
        f"tracebacks {tally['TRACEBACK']}, hangs {tally['HANG']}, {peak} MB at most"
    )


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.exit(bool(campaign(args.count, args.seed)))

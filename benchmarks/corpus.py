"""A large corpus: seconds until the first batch, and the peak resident memory of the whole process.

    python -m benchmarks.corpus --gigabytes=0.5

Writes text as JSON lines (documents of 0.1 to 20 kB, 2 kB on average), then starts as a run does, each
time in a process of its own: reads and splits the corpus, tokenises, takes the held-out rows of an evaluation
and `--batches` batches. There is no model. *prepare* fills an empty cache folder, *found* reads it, *memory*
has no cache (only up to `--memory_up_to`: it holds text, tokens and lists of them). The goals for 5 GB: found
in at most 10 s, and at most 1 GiB of memory, of which Python, JAX and moejax are `base`. Needs five times the
size of the text on the disk; the folder is removed at the end.
Results: docs/data.md.
"""

import json
import multiprocessing
import pathlib
import shutil
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks.common import report

GIGABYTES = flags.DEFINE_float("gigabytes", 0.5, "10^9 bytes of text to write.")
TOKENIZER = flags.DEFINE_string("tokenizer", "byte", "As data.tokenizer.")
BATCHES = flags.DEFINE_integer("batches", 200, "Of 16 rows of 1024 tokens.")
MEMORY_UP_TO = flags.DEFINE_float(
    "memory_up_to", 1.0, "Largest text that is tried without a cache."
)
FOLDER = flags.DEFINE_string("folder", "", "Written, and removed at the end [a temporary one].")
JSON = flags.DEFINE_string("json", "", "File for the results.")


def write_text(path: pathlib.Path, size: int) -> int:
    """About `size` bytes of text in different documents; returns how many documents."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"etaoinshrdlu"], rng.integers(1, 10))) for _ in range(20_000)]
    often = 1 / np.arange(1, len(words) + 1)  # Zipf
    common = " ".join(rng.choice(words, 2**21, p=often / often.sum()))
    documents = 0
    with path.open("w") as f:
        while size > 0:
            lengths = np.clip(rng.lognormal(7.1, 1.0, 10_000), 100, 20_000).astype(int)
            starts = rng.integers(len(common) - 20_000, size=len(lengths))
            for start, length in zip(starts.tolist(), lengths.tolist()):
                f.write(
                    json.dumps({"text": f"{documents} {common[start : start + length]}"}) + "\n"
                )
                documents, size = documents + 1, size - length
                if size <= 0:
                    break
    return documents


def peak_bytes() -> int:
    """The most resident memory that this process has had."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def start(text: str, cache: str | None, tokenizer: str, batches: int, out) -> None:
    """In a child process: peak of memory before and after, seconds to the first batch, batches a second."""
    from moejax.config import DataConfig
    from moejax.data import load_corpus, load_tokenizer, train_iterator, validation_batches

    base = peak_bytes()
    began = time.monotonic()
    cfg = DataConfig(sources=(f"text={text}",), tokenizer=tokenizer, seq_len=1024)
    corpus = load_corpus(cfg, cache=pathlib.Path(cache) if cache else None)
    read = time.monotonic() - began
    encoder = load_tokenizer(cfg, corpus)
    iterator = train_iterator(corpus, encoder, cfg)
    list(validation_batches(corpus, encoder, cfg, 50 * cfg.batch_size))
    next(iterator)
    first = time.monotonic() - began
    for _ in range(batches):
        next(iterator)
    rate = batches / (time.monotonic() - began - first)
    out.put((base, peak_bytes(), read, first, rate))


def main(argv):
    del argv
    if FOLDER.value and pathlib.Path(FOLDER.value).exists():
        raise app.UsageError(f"{FOLDER.value} exists; it would be removed at the end")
    folder = pathlib.Path(FOLDER.value or tempfile.mkdtemp(prefix="corpus_"))
    rows = []
    try:
        cache, text = folder / "cache", folder / "text.jsonl"
        cache.mkdir(parents=True)
        documents = write_text(text, int(GIGABYTES.value * 1e9))
        context = multiprocessing.get_context("spawn")
        ways: dict[str, str | None] = {"prepare": str(cache), "found": str(cache)}
        if GIGABYTES.value <= MEMORY_UP_TO.value:
            ways["memory"] = None
        for way, place in ways.items():
            out = context.Queue()
            args = (str(text), place, TOKENIZER.value, BATCHES.value, out)
            child = context.Process(target=start, args=args)
            child.start()
            child.join()
            if child.exitcode:
                raise RuntimeError(f"{way}: exit code {child.exitcode}")
            base, peak, read, first, rate = out.get()
            rows.append(
                {
                    "start": way,
                    "text read, s": f"{read:.1f}",
                    "first batch, s": f"{first:.1f}",
                    "batches/s": f"{rate:.0f}",
                    "peak memory, MiB": f"{peak / 2**20:.0f}",
                    "base, MiB": f"{base / 2**20:.0f}",
                }
            )
        kept = sum(p.stat().st_size for p in cache.rglob("*")) / 1e9
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    title = f"{GIGABYTES.value:g} GB of text in {documents:,} documents, {kept:.2f} GB kept"
    report(title, rows, JSON.value)


if __name__ == "__main__":
    app.run(main)

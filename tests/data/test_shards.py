"""Text and tokens in the user's cache: corpus, batches and positions are those of memory; little is held."""

import dataclasses
import gzip
import itertools
import json
import os
import sys
import tracemalloc
import types
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moejax import user_cache
from moejax.config import DataConfig
from moejax.data import load_corpus, load_tokenizer, store, train_iterator, validation_batches
from moejax.data import sources as sources_module
from moejax.data import tokens as tokens_module
from moejax.data.sources import DataError
from moejax.data.texts import StoredTexts

CFG = DataConfig(seq_len=16, batch_size=4, tokenizer="byte", seed=3)


def words(seed, count=60):
    """Texts of odd lengths and characters, a few of them twice."""
    rng = np.random.default_rng(seed)
    some = ["to", "be", "é", "\U0001f600", "or\n", "\r\n", "", "not"]
    texts = [" ".join(rng.choice(some, rng.integers(1, 30))) + f" {seed}" for _ in range(count)]
    return texts + texts[:5]


def as_lines(texts):
    return "".join(json.dumps({"text": t}) + "\n" for t in texts)


@pytest.fixture
def written(tmp_path):
    """A folder of text in every form, and beside it an empty cache."""
    folder, cache = tmp_path / "text", tmp_path / "cache"
    folder.mkdir()
    cache.mkdir()
    (folder / "a.jsonl").write_text(as_lines(words(1)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(as_lines(words(2)).encode()))
    (folder / "c.json").write_text(json.dumps([{"text": t} for t in words(3)]))
    pq.write_table(pa.table({"text": words(4)}), folder / "d.parquet")
    (folder / "e.txt").write_text("\n".join(words(5)))
    for i, text in enumerate(words(6, 20)):
        (folder / f"f{i}.md").write_text(text)
    return folder, cache


@pytest.fixture
def hugging_face(monkeypatch):
    def load_dataset(path, config, split):
        return [{"text": t} for t in words(7)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def run_of(cfg, cache, steps=25, **options):
    """Everything that a run reads: (corpus, batches, batches held out, state of the iterator)."""
    corpus = load_corpus(cfg, cache=cache)
    tokenizer = load_tokenizer(cfg, corpus)
    iterator = train_iterator(corpus, tokenizer, cfg, **options)
    batches = list(itertools.islice(iterator, steps))
    return corpus, batches, list(validation_batches(corpus, tokenizer, cfg)), iterator.get_state()


def check_same(got, want):
    (a, *lists_a, state_a), (b, *lists_b, state_b) = got, want
    assert a.manifest == b.manifest and a.weights == b.weights and state_a == state_b
    for side in ("train", "validation"):
        assert {k: [*v] for k, v in getattr(a, side).items()} == {
            k: [*v] for k, v in getattr(b, side).items()
        }
    for batches_a, batches_b in zip(lists_a, lists_b, strict=True):
        for batch_a, batch_b in zip(batches_a, batches_b, strict=True):
            assert batch_a.keys() == batch_b.keys()
            for key, value in batch_a.items():
                np.testing.assert_array_equal(value, batch_b[key])
                assert value.dtype == batch_b[key].dtype


KINDS = {
    "lines": {"sources": ("a={}/a.jsonl",)},
    "gzip": {"sources": ("a={}/b.jsonl.gz",)},
    "array": {"sources": ("a={}/c.json",)},
    "parquet": {"sources": ("a={}/d.parquet",)},
    "one text": {"sources": ("a={}/e.txt",)},
    "texts": {"sources": ("a={}/*.md",)},
    "hf": {"sources": ("a=hf:org/name",)},
    "builtin": {"sources": ("builtin",), "max_bytes": 60_000},
    "mixture": {
        "sources": ("a={}/*.json*", "b={}/d.parquet", "c={}/e.txt", "h=hf:x", "d={}/a.jsonl"),
        "weights": (5, 1, 2, 0.5, 0),
    },
    "limit": {"sources": ("a={}/*.jsonl*", "b={}/d.parquet"), "max_bytes": 1001},
    "bpe": {"sources": ("a={}/*.json*", "b={}/e.txt"), "tokenizer": "bpe", "vocab_size": 300},
    "long rows": {"sources": ("a={}/*.md",), "seq_len": 512, "batch_size": 2},
}  # fmt: skip


def of_kind(kind, folder):
    changes = dict(KINDS[kind])
    changes["sources"] = tuple(s.format(folder) for s in changes["sources"])
    return dataclasses.replace(CFG, **changes)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_those_of_memory(written, hugging_face, kind):
    folder, cache = written
    cfg = of_kind(kind, folder)
    want = run_of(cfg, None)
    check_same(run_of(cfg, cache), want)  # prepares
    check_same(run_of(cfg, cache), want)  # finds
    tokenizer, whole = load_tokenizer(cfg, want[0]), []
    for c in (None, cache, cache):
        corpus = load_corpus(cfg, only_validation=True, cache=c)
        whole.append((corpus, list(validation_batches(corpus, tokenizer, cfg)), 0))
    check_same(whole[1], whole[0])
    check_same(whole[2], whole[0])


@pytest.mark.parametrize("steps", [0, 1, 13, 60])
def test_a_run_that_began_in_memory_goes_on_with_shards(written, steps):
    """And the other way round; 60 batches are several epochs."""
    folder, cache = written
    cfg = of_kind("limit", folder)
    corpora = [load_corpus(cfg, cache=c) for c in (None, cache)]
    tokenizer = load_tokenizer(cfg, corpora[0])
    for first, second in (corpora, corpora[::-1]):
        iterator = train_iterator(first, tokenizer, cfg)
        for _ in range(steps):
            next(iterator)
        state = json.loads(json.dumps(iterator.get_state()))
        resumed = train_iterator(second, tokenizer, cfg)
        next(resumed)
        resumed.set_state(state)
        for _ in range(10):
            want, got = next(iterator), next(resumed)
            for key in want:
                np.testing.assert_array_equal(got[key], want[key])


def test_processes_share_the_global_batch(written):
    folder, cache = written
    cfg = of_kind("mixture", folder)
    cfg = dataclasses.replace(cfg, sources=cfg.sources[:3], weights=())
    whole = run_of(cfg, None)[1]
    parts = [run_of(cfg, cache, process_index=p, process_count=2)[1] for p in range(2)]
    for batch, *halves in zip(whole, *parts, strict=True):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([h[key] for h in halves]), value)


def forbid_reading(monkeypatch):
    def no(*args, **kwargs):
        raise AssertionError("read or tokenised again")

    for name in ("json_values", "_read_parquet", "_read_text"):
        monkeypatch.setattr(sources_module, name, no)
    monkeypatch.setattr(tokens_module, "_pieces", no)


def test_a_second_start_reads_no_file_and_tokenises_nothing(written, monkeypatch):
    folder, cache = written
    cfg = dataclasses.replace(
        of_kind("texts", folder), sources=(f"a={folder}/*.json*", f"b={folder}/*.md")
    )
    lines = []
    run_of(cfg, cache, say=lines.append)
    assert not lines
    forbid_reading(monkeypatch)
    run_of(cfg, cache, say=lines.append)
    [line] = lines
    assert line.startswith(f"tokens of a, b: read from {cache}, prepared ") and line.endswith(
        " ago"
    )


def test_the_same_text_elsewhere_needs_no_new_tokens(written, monkeypatch):
    folder, cache = written
    run_of(of_kind("lines", folder), cache)
    os.utime(folder / "a.jsonl", (1000, 1000))
    monkeypatch.setattr(tokens_module, "_pieces", None)
    run_of(dataclasses.replace(of_kind("lines", folder), sources=(f"z={folder}/a.jsonl",)), cache)


def append(folder):
    with (folder / "a.jsonl").open("a") as f:
        f.write(as_lines(["one more"]))


def same_size_and_time(folder):
    """Only the time at which the system saw the change tells."""
    path = folder / "a.jsonl"
    stat = path.stat()
    path.write_text(path.read_text().replace("be", "BE"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_mtime_ns == stat.st_mtime_ns and path.stat().st_size == stat.st_size


def another_file(folder):
    (folder / "aa.jsonl").write_text(as_lines(words(9)))


@pytest.mark.parametrize("change", [append, same_size_and_time, another_file])
def test_text_that_changed_is_read_again(written, change):
    folder, cache = written
    cfg = dataclasses.replace(CFG, sources=(f"a={folder}/a*.jsonl",))
    before = run_of(cfg, cache)
    change(folder)
    got, want = run_of(cfg, cache), run_of(cfg, None)
    check_same(got, want)
    assert got[0].manifest["sha256"] != before[0].manifest["sha256"]


@pytest.mark.parametrize(
    "changes",
    [
        {"text_field": "other"},
        {"max_bytes": 500},
        {"validation_fraction": 0.5},
        {"tokenizer": "bpe", "vocab_size": 270},
    ],
)  # fmt: skip
def test_another_config_finds_nothing_wrong(written, changes):
    folder, cache = written
    texts = words(1)
    (folder / "x.jsonl").write_text(
        "".join(json.dumps({"text": t, "other": t[::-1]}) + "\n" for t in texts)
    )
    cfg = dataclasses.replace(CFG, sources=(f"a={folder}/x.jsonl",))
    run_of(cfg, cache)
    cfg = dataclasses.replace(cfg, **changes)
    check_same(run_of(cfg, cache), run_of(cfg, None))


def test_files_that_change_while_they_are_read_are_an_error(written, monkeypatch):
    folder, cache = written
    real = sources_module.json_values

    def changing(*args):
        append(folder)
        yield from real(*args)

    monkeypatch.setattr(sources_module, "json_values", changing)
    with pytest.raises(DataError, match=r"a.jsonl': its files changed while they were read"):
        run_of(of_kind("lines", folder), cache)
    assert not [p for p in cache.iterdir() if p.is_dir()]


def test_damaged_tokens_stop_the_run_and_the_next_start_has_the_same_batches(written):
    folder, cache = written
    cfg = of_kind("lines", folder)
    want = run_of(cfg, None)
    run_of(cfg, cache)
    for name in ("ids", "num_bytes", "text"):
        for path in cache.glob(f"*/{name}.bin"):
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 4
            path.write_bytes(data)
        with pytest.raises(DataError, match="the same command prepares it again"):
            for side in run_of(cfg, cache)[0].train.values():
                list(side)
        for _ in range(2):  # a training and a held-out side, one found a start
            try:
                check_same(run_of(cfg, cache), want)
            except DataError:
                continue
        check_same(run_of(cfg, cache), want)


def test_skipped_records_are_counted_at_every_start(written):
    folder, cache = written
    with (folder / "a.jsonl").open("a") as f:
        f.write('bad\n{"no": 1}\n')
    cfg = dataclasses.replace(of_kind("lines", folder), skip_bad_records=True)
    said = []
    for c in (None, cache, cache):
        with pytest.warns(UserWarning, match="2 bad records of domain 'a' were skipped") as caught:
            corpus = load_corpus(cfg, cache=c)
        assert corpus.manifest["skipped_records"] == {"a": 2}
        said += [str(w.message) for w in caught]
    assert len(said) == 3 and len(set(said)) == 1
    with pytest.raises(DataError, match="not JSON"):
        load_corpus(of_kind("lines", folder), cache=cache)


def test_unknown_bytes_are_told_at_every_start(written, tmp_path):
    import tokenizers

    folder, cache = written
    vocab = {"[UNK]": 0, "</s>": 1, "to": 2, "be": 3}
    model = tokenizers.models.WordLevel(vocab, "[UNK]")  # pyright: ignore
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()  # pyright: ignore
    tokenizer.add_special_tokens(["[UNK]", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    cfg = dataclasses.replace(of_kind("lines", folder), tokenizer=str(tmp_path / "tokenizer.json"))
    said = []
    for c in (None, cache, cache):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run_of(cfg, c)
        said.append([str(w.message) for w in caught])
    assert said[0] == said[1] == said[2] and len(said[0]) == 2


@pytest.mark.parametrize("only_validation", [False, True])
def test_memory_does_not_grow_with_the_text(tmp_path, only_validation):
    """40 MB of text, 80 MB of tokens: pieces of 1 MB, 4 MB of characters and their tokens may be held."""
    with (tmp_path / "x.jsonl").open("w") as f:
        for i in range(2000):
            f.write(json.dumps({"text": f"{i} word" * 2500}) + "\n")
    cfg = dataclasses.replace(CFG, sources=(f"x={tmp_path}/x.jsonl",), validation_fraction=0.01)
    for most in (80, 8):  # when it is prepared, and when it is found
        tracemalloc.start()
        corpus = load_corpus(cfg, only_validation=only_validation, cache=tmp_path)
        tokenizer = load_tokenizer(cfg)
        if not only_validation:
            next(train_iterator(corpus, tokenizer, cfg))
        validation_batches(corpus, tokenizer, cfg, 100)[0]
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        if only_validation and most == 80:
            most = 300  # ids in lists, and the bytes of each
        assert peak < most
    assert isinstance(corpus.validation["x"], StoredTexts)


def test_off_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv(user_cache.SWITCH, "off")
    assert user_cache.place("text") is None and not (tmp_path / "cache").exists()
    monkeypatch.delenv(user_cache.SWITCH)
    assert user_cache.place("text") == tmp_path / "cache/moejax/text"
    assert store.FORMAT == 1  # a change of what is written needs another number

"""The corpus: splitting without leaks, byte limits, weights, manifest, and the built-in text."""

import dataclasses
import json
import warnings

import pytest

from moejax.config import DataConfig
from moejax.data import builtin
from moejax.data.corpus import load_corpus
from moejax.data.sources import DataError


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


def config(*sources, **changes):
    return dataclasses.replace(DataConfig(sources=sources), **changes)


def texts(documents):
    return [d.text for d in documents]


@pytest.fixture
def two_domains(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [f"a {i}" for i in range(300)])
    b = write_jsonl(tmp_path / "b.jsonl", [f"bbbb {i}" for i in range(100)])
    return f"a={a}", f"b={b}"


def test_split_is_a_partition_of_about_the_fraction(two_domains):
    corpus = load_corpus(config(*two_domains, validation_fraction=0.2))
    assert corpus.domains == ("a", "b") and tuple(corpus.validation) == ("a", "b")
    train, validation = texts(corpus.train["a"]), texts(corpus.validation["a"])
    assert sorted(train + validation) == sorted(f"a {i}" for i in range(300))
    # Binomial(300, 0.2): mean 60, deviation 7; four deviations either side.
    assert 32 < len(validation) < 88


def test_split_depends_on_content_alone(tmp_path, two_domains):
    held_out = set(texts(load_corpus(config(*two_domains)).validation["a"]))
    reordered = write_jsonl(tmp_path / "r.jsonl", [f"a {i}" for i in reversed(range(300))])
    assert (
        set(texts(load_corpus(config(f"other={reordered}", seed=5)).validation["other"]))
        == held_out
    )


def test_duplicates_land_on_one_side_also_across_domains(tmp_path):
    """The one document held out of the small domain must leave the large one's training set too."""
    small = write_jsonl(tmp_path / "small.jsonl", ["x 1", "x 2", "x 1", "x 3"])
    large = write_jsonl(tmp_path / "large.jsonl", [f"x {i}" for i in range(40)] * 2)
    corpus = load_corpus(config(f"s={small}", f"l={large}", validation_fraction=0.001))
    train = {t for d in corpus.train.values() for t in texts(d)}
    validation = {t for d in corpus.validation.values() for t in texts(d)}
    assert corpus.validation["s"] and corpus.validation["l"]
    assert train.isdisjoint(validation)
    assert sum(len(d) for d in (*corpus.train.values(), *corpus.validation.values())) == 84


def test_every_domain_has_validation_documents(tmp_path):
    sources = [
        f"d{i}={write_jsonl(tmp_path / f'{i}.jsonl', [f'{i} a', f'{i} b'])}" for i in range(20)
    ]
    corpus = load_corpus(config(*sources, validation_fraction=1e-6))
    assert all(len(d) == 1 for d in (*corpus.train.values(), *corpus.validation.values()))


def test_a_single_text_is_cut_at_a_line(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    corpus = load_corpus(config(f"book={tmp_path}/*.txt", validation_fraction=0.1))
    [head], [tail] = corpus.train["book"], corpus.validation["book"]
    assert head.text + tail.text == text and tail.text.startswith("line ")
    assert len(tail.text) == pytest.approx(0.1 * len(text), abs=10)  # a line
    (tmp_path / "book.txt").write_text("no line end at all")
    corpus = load_corpus(config(f"book={tmp_path}/*.txt", validation_fraction=0.1))
    assert texts(corpus.train["book"]) == ["no line end at a"]


def test_empty_documents_are_left_out(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", ["x", "", " \n", "y"])
    corpus = load_corpus(config(f"a={a}"))
    assert {*texts(corpus.train["a"]), *texts(corpus.validation["a"])} == {"x", "y"}


def test_max_bytes_limits_each_domain(two_domains, tmp_path):
    corpus = load_corpus(config(*two_domains, max_bytes=100))
    total = {
        n: d["train_bytes"] + d["validation_bytes"] for n, d in corpus.manifest["domains"].items()
    }
    assert total == {"a": 100, "b": 100}
    (tmp_path / "u.txt").write_text("é" * 100)  # two bytes each: 51 falls inside a character
    corpus = load_corpus(config(f"u={tmp_path}/u.txt", max_bytes=51))
    assert corpus.train["u"][0].text + corpus.validation["u"][0].text == "é" * 25


def test_only_validation_holds_out_every_document_whole(two_domains):
    split = load_corpus(config(*two_domains))
    whole = load_corpus(config(*two_domains), only_validation=True)
    assert whole.domains == split.domains
    for name in whole.domains:
        assert whole.train[name] == ()
        both = {d.text for d in (*split.train[name], *split.validation[name])}
        assert {d.text for d in whole.validation[name]} == both


def test_weights(two_domains):
    by_size = load_corpus(config(*two_domains))
    sizes = [d["train_bytes"] for d in by_size.manifest["domains"].values()]
    assert by_size.weights == pytest.approx([s / sum(sizes) for s in sizes])
    assert load_corpus(config(*two_domains, weights=(3, 1))).weights == pytest.approx([0.75, 0.25])
    with pytest.raises(DataError, match=r"data.weights has 1 entries for 2 data.sources"):
        load_corpus(config(*two_domains, weights=(1.0,)))


def test_manifest(two_domains, tmp_path):
    corpus = load_corpus(config(*two_domains))
    manifest = corpus.manifest
    assert json.loads(json.dumps(manifest)) == manifest
    file = {"domain": "a", "file": f"{tmp_path}/a.jsonl", "documents": 300, "bytes": 1390}
    assert manifest["files"][0] == file
    assert manifest["bytes"] == 1390 + sum(len(f"bbbb {i}") for i in range(100))
    domain = manifest["domains"]["b"]
    assert domain["train_documents"] == len(corpus.train["b"])
    assert domain["train_documents"] + domain["validation_documents"] == 100
    assert load_corpus(config(*two_domains)).manifest == manifest
    write_jsonl(tmp_path / "b.jsonl", [f"bbbb {i}" for i in range(99)] + ["cccc 99"])
    assert load_corpus(config(*two_domains)).manifest["sha256"] != manifest["sha256"]


def test_bad_corpora(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", ["x", "y"])
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", " "])
    same = write_jsonl(tmp_path / "same.jsonl", ["x", "x"])
    short = write_jsonl(tmp_path / "short.jsonl", ["x"])
    half = tmp_path / "half.jsonl"
    half.write_text('{"text": "ok \\ud800"}\n')
    for sources, message in [
        ((f"a={a}", f"a={a}"), "there is a domain 'a' already; give this one another name"),
        (("builtin", f"code={a}"), "there is a domain 'code' already"),
        ((f"e={empty}",), "domain 'e' has no text"),
        ((f"s={same}",), "all 2 documents of domain 's' are held out"),
        ((f"s={short}",), "too short to hold out its end"),
        ((f"h={half}",), f"{half}:1: character 3 is '\\ud800'"),
    ]:
        with pytest.raises(DataError) as e:
            load_corpus(config(*sources, max_bytes=10_000))
        assert message in str(e.value)


def test_builtin_limit_takes_a_sample():
    corpus = load_corpus(DataConfig(max_bytes=200_000))
    sizes = [d["train_bytes"] + d["validation_bytes"] for d in corpus.manifest["domains"].values()]
    assert sizes == [200_000] * 3
    folders = {d.file.split("/")[0] for d in corpus.train["prose"]}
    assert {"numpy", "scipy"} <= folders


@pytest.fixture(scope="module")
def builtin_corpus():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_corpus(DataConfig())


def test_builtin_is_large_and_labelled(builtin_corpus):
    assert builtin_corpus.domains == ("code", "prose", "c")
    assert builtin_corpus.manifest["bytes"] >= 10_000_000
    for domain in builtin_corpus.manifest["domains"].values():
        assert domain["train_bytes"] > 2_000_000
        assert domain["validation_documents"] >= 1
    assert sum(builtin_corpus.weights) == pytest.approx(1)


def test_builtin_leaks_nothing(builtin_corpus):
    """No file, no document and no docstring is on both sides."""
    sides = []
    for side in (builtin_corpus.train, builtin_corpus.validation):
        documents = [d for documents in side.values() for d in documents]
        sides.append(({d.file for d in documents}, {d.text for d in documents}))
        assert len(sides[-1][1]) == len(documents)
    assert sides[0][0].isdisjoint(sides[1][0]) and sides[0][1].isdisjoint(sides[1][1])
    files = [d.file for d in builtin_corpus.train["code"]]
    assert not any("moejax" in f or "/test/" in f or "site-packages" in f for f in files)


def test_builtin_uses_a_docstring_once(tmp_path, monkeypatch):
    shared = "shared by two files " * 20
    for name in ("one", "two"):
        own = f"only in {name} " * 20
        source = f'"""{own}"""\ndef f():\n    """{shared}"""\n'
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.setattr(builtin, "_DOCSTRING_PACKAGES", ("package",))
    monkeypatch.setattr(builtin, "_package_folder", lambda package: str(tmp_path))
    monkeypatch.setattr(builtin, "_DESCRIBED", ())
    monkeypatch.setattr(builtin, "_help_topics", dict)
    first, second = texts(builtin._prose())
    assert shared.strip() in first and shared.strip() not in second
    assert "only in" in first and "only in" in second


def test_builtin_reads_docstrings_and_drops_licences(tmp_path):
    source = '"""Module."""\nclass A:\n    """Class."""\n    def f(self):\n        """Method."""\n'
    (tmp_path / "m.py").write_text(source + 'x = "not a docstring"\ndef g(): pass\n')
    assert builtin._docstrings(str(tmp_path / "m.py")) == ["Module.", "Class.", "Method."]
    (tmp_path / "m.py").write_text("def broken(:")
    assert builtin._docstrings(str(tmp_path / "m.py")) == []
    assert builtin._without_license("// Licensed to X\n// under Y\n\nint a;\n") == "int a;\n"
    assert builtin._without_license("/* The License. */\nint a;\n") == "int a;\n"
    assert builtin._without_license("// What it does\nint a;\n") == "// What it does\nint a;\n"

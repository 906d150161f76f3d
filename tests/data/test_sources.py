"""Every kind of source, and what each says when it cannot be read."""

import gzip
import json
import sys
import types

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from moejax.data.sources import DataError, parse_source, read_documents

RECORDS = [{"text": "first\nlines", "id": 1}, {"text": "zwei äöü", "id": 2}]
JSONL = "".join(json.dumps(r) + "\n" for r in RECORDS).encode()


def read(target, field="text", max_bytes=0):
    found = []
    for d in read_documents(str(target), field, max_bytes):
        if isinstance(d, DataError):
            raise d
        found.append((d.id, d.text))
    return found


def error(target, field="text") -> str:
    with pytest.raises(DataError) as e:
        read(target, field)
    return str(e.value)


def test_parse_source():
    assert parse_source("code=src/**/*.py") == ("code", "src/**/*.py")
    assert parse_source("a-b.c_1=hf:org/name:config=x:train") == (
        "a-b.c_1",
        "hf:org/name:config=x:train",
    )


@pytest.mark.parametrize("source", ["builtins", "=x", "x=", "two words=x", ""])
def test_unknown_syntax_is_explained(source):
    with pytest.raises(DataError, match="expected 'builtin', 'domain=glob' or 'domain=hf:"):
        parse_source(source)


def test_text_files_are_documents_in_sorted_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("deep")
    (tmp_path / "b.txt").write_bytes("naïve\r\n".encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    (tmp_path / "d.txt.zst").write_bytes(zstandard.compress(b"denser"))
    assert read(tmp_path / "**" / "*.txt*") == [
        (f"{tmp_path}/b.txt", "naïve\r\n"),
        (f"{tmp_path}/c.txt.gz", "packed"),
        (f"{tmp_path}/d.txt.zst", "denser"),
        (f"{tmp_path}/sub/a.txt", "deep"),
    ]


@pytest.mark.parametrize(
    "suffix, compress",
    [
        ("", bytes),
        (".gz", gzip.compress),
        (".zst", zstandard.compress),
        # Concatenated members and frames, as parallel compressors write them.
        (".gz", lambda b: gzip.compress(b[:20]) + gzip.compress(b[20:])),
        (".zst", lambda b: zstandard.compress(b[:20]) + zstandard.compress(b[20:])),
    ],
    ids=["plain", "gz", "zst", "gz-members", "zst-frames"],
)
def test_jsonl(tmp_path, suffix, compress):
    file = tmp_path / f"x.jsonl{suffix}"
    file.write_bytes(compress(JSONL))
    assert read(file) == [(f"{file}:1", "first\nlines"), (f"{file}:2", "zwei äöü")]


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_bytes('{"text": "a\u2028b"}\n\n{"text": "no newline at the end"}'.encode())
    assert read(file) == [(f"{file}:1", "a\u2028b"), (f"{file}:3", "no newline at the end")]


def test_jsonl_long_lines_cross_read_buffers(tmp_path):
    texts = ["x" * 3_000_000, "y" * 10, "z" * 1_100_000]
    file = tmp_path / "x.jsonl"
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    assert [text for _, text in read(file)] == texts


def test_parquet(tmp_path):
    file = tmp_path / "x.parquet"
    texts = [f"row {i}" for i in range(2000)]  # more than one batch
    pq.write_table(pa.table({"body": texts, "n": range(2000)}), file)
    assert read(file, "body") == [(f"{file}:{i + 1}", t) for i, t in enumerate(texts)]


def test_no_match_names_the_glob(tmp_path):
    assert f"no file matches '{tmp_path}/*.nope'" in error(tmp_path / "*.nope")


def test_not_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"ok \xff no")
    assert f"{tmp_path}/x.txt: not UTF-8 at byte offset 3 (byte 0xff)" in error(tmp_path / "x.txt")
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "\xe4"}\n')
    assert f"{tmp_path}/x.jsonl:2: not UTF-8 at byte offset 25" in error(tmp_path / "x.jsonl")


def test_missing_field_names_line_and_known_fields(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(JSONL + b'{"body": "b", "id": 3}\n')
    assert (
        f"{tmp_path}/x.jsonl:3: no field data.text_field='text'; its fields are 'body', 'id'"
    ) == error(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": 3}', "x.jsonl:1: field data.text_field='text' is a int, not text"),
        (b'{"text": null}', "x.jsonl:1: field data.text_field='text' is a NoneType, not text"),
        (b'["text"]', "x.jsonl:1: a list, not a JSON object"),
        (b'{"text": ', "x.jsonl:1: not JSON (Expecting value at column"),
    ],
)
def test_bad_jsonl_lines(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_bytes(line)
    assert message in error(tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    "name, data",
    [
        ("x.jsonl.gz", JSONL),  # not compressed at all
        ("x.jsonl.zst", JSONL),
        ("x.jsonl.gz", gzip.compress(JSONL)[:-9]),  # truncated
        ("x.jsonl.zst", zstandard.compress(JSONL)[:-1]),
        ("x.jsonl.zst", b""),
        ("x.jsonl.gz", b""),
        ("x.txt.gz", gzip.compress(JSONL)[:15] + b"\0\0\0\0" + gzip.compress(JSONL)[19:]),
    ],
    ids=["plain-gz", "plain-zst", "cut-gz", "cut-zst", "empty-zst", "empty-gz", "damaged-gz"],
)
def test_broken_compression_names_the_file(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    assert f"{tmp_path}/{name}: broken compressed file" in error(tmp_path / name)


def test_broken_parquet_names_the_file(tmp_path):
    file = tmp_path / "x.parquet"
    file.write_bytes(b"PAR1 not really")
    assert f"{file}: not a readable Parquet file" in error(file)
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), file)
    assert "no column data.text_field='body'; its columns are 'text', 'n'" in error(file, "body")
    assert "column data.text_field='n' is int64, not text" in error(file, "n")


def test_parquet_null_names_the_row(tmp_path):
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["a", None]}), file)
    assert f"{file}:2: field data.text_field='text' is a NoneType, not text" == error(file)


def fake_datasets(monkeypatch, load_dataset):
    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hugging_face(monkeypatch):
    calls = []

    def load_dataset(path, config, *, split):
        calls.append((path, config, split))
        return RECORDS

    fake_datasets(monkeypatch, load_dataset)
    assert read("hf:org/name") == [("hf:org/name:1", "first\nlines"), ("hf:org/name:2", "zwei äöü")]
    read("hf:org/name:config")
    read("hf:org/name:config:test")
    read("hf:org/name::test[:10%]")
    assert calls == [
        ("org/name", None, "train"),
        ("org/name", "config", "train"),
        ("org/name", "config", "test"),
        ("org/name", None, "test[:10%]"),
    ]
    assert "its fields are 'text', 'id'" in error("hf:org/name", "body")
    assert "expected 'hf:path[:config[:split]]'" in error("hf::b:c")


def test_hugging_face_failure_names_the_source(monkeypatch):
    def load_dataset(path, config, *, split):
        raise FileNotFoundError("no such data set")

    fake_datasets(monkeypatch, load_dataset)
    assert error("hf:org/nope") == "data.sources: 'hf:org/nope' cannot be loaded: no such data set"


def test_hugging_face_needs_datasets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # import raises ImportError
    assert "pip install 'moejax[hf]'" in error("hf:org/name")

"""Files as they come: any compression, any layout of JSON, marks, links, bombs; read once and bounded."""

import bz2
import dataclasses
import gzip
import itertools
import json
import lzma
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moejax.config import DataConfig
from moejax.data import files, sources
from moejax.data.corpus import load_corpus
from moejax.data.sources import DataError, read_documents

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def read(target, field="text", max_bytes=0):
    return list(read_documents(str(target), field, max_bytes))


def texts(target, **options):
    found = read(target, **options)
    bad = [d for d in found if isinstance(d, DataError)]
    if bad:
        raise bad[0]
    return [d.text for d in found if not isinstance(d, DataError)]


def error(target, **options) -> str:
    with pytest.raises(DataError) as e:
        texts(target, **options)
    return str(e.value)


def as_lines(records):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)


RECORDS = [{"text": f"story {i} "} for i in range(99)]


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("name", ["c4.json", "x.jsonl", "x.ndjson", "x.JSONLINES", "part-00000"])
def test_lines_of_json_under_any_name(tmp_path, name, compression):
    file = tmp_path / f"{name}{compression}"
    file.write_bytes(COMPRESS[compression](as_lines(RECORDS).encode()))
    assert texts(file) == [r["text"] for r in RECORDS]
    assert read(file)[4].id == f"{file}:5"  # pyright: ignore


def test_corpus_of_json_lines_called_json(tmp_path):
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(as_lines(RECORDS).encode()))
    corpus = load_corpus(DataConfig(sources=(f"c4={tmp_path}/c4.json.gz",)))
    assert len(corpus.train["c4"]) + len(corpus.validation["c4"]) == 99


@pytest.mark.parametrize("compression", [c for c in COMPRESS if c])
def test_content_decides_about_compression(tmp_path, compression):
    """As in a cache whose files are named by their hashes."""
    (tmp_path / "5f3a").write_bytes(COMPRESS[compression](as_lines(RECORDS).encode()))
    assert len(texts(tmp_path / "5f3a")) == 99
    (tmp_path / "x.txt").write_bytes(COMPRESS[compression](b"packed"))
    assert texts(tmp_path / "x.txt") == ["packed"]
    (tmp_path / f"y.txt{compression}").write_bytes(b"not packed")
    assert "broken compressed file" in error(tmp_path / f"y.txt{compression}")
    (tmp_path / f"y.txt{compression}").write_bytes(COMPRESS[compression](b"cut" * 99)[:-5])
    assert "broken compressed file" in error(tmp_path / f"y.txt{compression}")


@pytest.mark.parametrize("compression", [c for c in COMPRESS if c])
def test_joined_compressed_files_are_one(tmp_path, compression):
    data = as_lines(RECORDS).encode()
    parts = [COMPRESS[compression](p) for p in (data[:100], data[100:])]
    (tmp_path / f"x.jsonl{compression}").write_bytes(b"".join(parts))
    assert len(texts(tmp_path / f"x.jsonl{compression}")) == 99


RECORD = st.dictionaries(
    st.sampled_from(["id", "meta", "text2"]),
    st.recursive(
        st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    ),
)


def layouts(records):
    dump = json.dumps
    return {
        "lines": as_lines(records),
        "array": dump(records),
        "array of lines": "[\n" + ",\n".join(dump(r) for r in records) + "\n]\n",
        "pretty array": dump(records, indent=2, ensure_ascii=False),
        "pretty values": "\n".join(dump(r, indent=2) for r in records),
        "windows": as_lines(records).replace("\n", "\r\n"),
    }


@given(
    st.lists(st.tuples(RECORD, st.text(max_size=20)), min_size=1, max_size=5),
    st.integers(1, 9),
    st.sampled_from(["", "\ufeff"]),
)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_json_of_any_layout(tmp_path, monkeypatch, items, chunk, mark):
    """Also when records, characters and numbers are cut by the ends of what is read at once."""
    records = [{**record, "text": text} for record, text in items]
    for name, content in layouts(records).items():
        file = tmp_path / "x.json"
        file.write_bytes((mark + content).encode("utf-8", "surrogatepass"))
        with monkeypatch.context() as m:
            m.setattr(files, "CHUNK", 10_000)
            whole = texts(file)
            assert whole == [r["text"] for r in records], name
            # The first chunk says what a file is; later ones may be of any length.
            m.setattr(files, "chunks", lambda f, most=0: pieces(f, chunk))
            scan = sources._values(sources._Scanner(str(file), 0))
            if not mark:
                assert list(scan) == records
                if name in ("lines", "windows"):
                    assert [json.loads(line) for _, _, line in files.lines(str(file))] == records  # pyright: ignore


def pieces(file, size):
    with open(file, "rb") as f:
        while data := f.read(size):
            yield data


@given(st.binary(max_size=60), st.integers(1, 7))
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_lines_are_what_split_gives(tmp_path, monkeypatch, data, size):
    """'\\n' alone ends a line, and places are exact."""
    data = data.replace(b"\x01", b"\n").replace(b"\x02", b" ")
    (tmp_path / "x").write_bytes(data)
    with monkeypatch.context() as m:
        m.setattr(files, "chunks", lambda f, most=0: pieces(f, size))
        got = list(files.lines(str(tmp_path / "x")))
    want, offset = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip(b" \t\r"):
            want.append((number, offset, line))
        offset += len(line) + 1
    assert got == want


@pytest.mark.parametrize(
    "content, message",
    [
        ('[{"text": "a"}', "x.json:1: the array does not end"),
        ('[{"text": "a"} {"text": "b"}]', "x.json:1: the array does not end, or a comma is missing"),
        ('[{"text": "a"},]', "x.json:1: an item is missing after the last comma"),
        ('[{"text": "a"}, nope]', "x.json:2: not JSON (Expecting value"),
        ('[{"text": "a"}] more', "x.json:1: there is more after the array"),
        ('[{"text": "a"}, "b"]', "x.json:2: a str, not a JSON object"),
        ('{\n"data": [{"text": "a"}]}', "x.json:1: no field data.text_field='text'; its fields are 'data'"),
        ('{"text": ' + "1" * 5000 + "}", "x.json:1: not JSON (Exceeds the limit"),
        ("[" * 100_000, "x.json:1: not JSON (too deeply nested)"),
    ],
)  # fmt: skip
def test_broken_json_says_where(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    assert message in error(tmp_path / "x.json")


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"text": ' + "1" * 5000 + "}", "x.jsonl:1: not JSON (Exceeds the limit"),
        ("[" * 100_000, "x.jsonl:1: not JSON (too deeply nested)"),
        ('{"a": 1}\f', "x.jsonl:1: not JSON (Extra data"),
        ("\u2028", "x.jsonl:1: not JSON"),
        (json.dumps({f"{i}" * 99: 1 for i in range(99)}), ", ..."),
    ],
)
def test_broken_lines_say_where_in_few_words(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_text(line)
    said = error(tmp_path / "x.jsonl")
    assert message in said and len(said) < 1000


def test_only_newlines_end_lines(tmp_path):
    odd = "a\u2028b\x0c\x85c\x0b\x1c\x1d\u2029d\re"
    (tmp_path / "x.jsonl").write_bytes(
        (json.dumps({"text": odd}, ensure_ascii=False) + "\r\n").encode()
    )
    assert texts(tmp_path / "x.jsonl") == [odd]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbfb")
    assert texts(tmp_path / "x.txt") == ["a\ufeffb"]  # within a text it is a character
    line = b'\xef\xbb\xbf{"text": "a"}\n'
    (tmp_path / "x.jsonl").write_bytes(line * 2)
    assert texts(tmp_path / "x.jsonl") == ["a", "a"]
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf[{"text": "a"}]')
    assert texts(tmp_path / "x.json") == ["a"]
    (tmp_path / "w.txt").write_bytes("text".encode("utf-16"))
    assert "not UTF-8 at byte offset 0 (byte 0xff, the start of UTF-16)" in error(
        tmp_path / "w.txt"
    )


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x.csv", b"text\nhello\n", ".csv files cannot be read; convert it to .jsonl or .parquet"),
        ("x.tar.gz", gzip.compress(b"x", mtime=0), ".tar files cannot be read; unpack it"),
        ("x.jsonl.lz4", b"x", ".lz4 files cannot be read; compress it as .gz"),
        (
            "x.bin",
            b"\x7fELF\0\0",
            "this is a binary file; text, .jsonl, .json and .parquet can be read",
        ),
        ("x.parquet.gz", gzip.compress(b"PAR1", mtime=0), "decompress the file itself"),
        ("x.txt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        ("x.json", b"\xff\xfe{\0", "not UTF-8 at byte offset 0"),
        ("x.json", b'[{"text": "ok"}, {"text": "\xe4"}]', "not UTF-8 at byte offset 27"),
        ("x.json", b'[{"text": "\xc3', "not UTF-8 at byte offset 11"),
    ],
)
def test_what_is_not_text_is_refused(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert message in error(tmp_path / name)


def test_unknown_names_are_text_unless_they_look_like_records(tmp_path):
    (tmp_path / "a.py").write_text("{}\nprint()")
    (tmp_path / "b").write_text("just text")
    (tmp_path / "c.data").write_text('[ {"text": "record"}]')
    (tmp_path / "d.txt").write_text('{"text": "as it is"}')
    long = "x" * (files.CHUNK + 10)
    (tmp_path / "e.part").write_text(as_lines([{"text": long}] * 2))
    pq.write_table(pa.table({"text": ["row"]}), tmp_path / "f")
    assert texts(tmp_path / "*") == [
        *("{}\nprint()", "just text", "record", '{"text": "as it is"}', long, long, "row")
    ]


@pytest.mark.parametrize(
    "array",
    [
        pa.array(["a", "ü"], pa.large_string()),
        pa.array(["a", "ü"], pa.string_view()),
        pa.array(["a", "ü"]).dictionary_encode(),
        pa.DictionaryArray.from_arrays([0, 1], pa.array(["a", "ü"], pa.large_string())),
    ],
    ids=["large", "view", "dictionary", "large-dictionary"],
)
def test_parquet_text_of_every_kind(tmp_path, array):
    pq.write_table(pa.table({"id": [1, 2], "a.b": array, "a": [3, 4]}), tmp_path / "x.parquet")
    assert texts(tmp_path / "x.parquet", field="a.b") == ["a", "ü"]


def test_parquet_that_is_no_text(tmp_path):
    file = tmp_path / "x.parquet"
    for array, what in [
        (pa.array([b"a"]), "is binary, not text; cast it to string"),
        (pa.array([b"a"]).dictionary_encode(), "is binary, not text; cast it"),
        (pa.array([["a"]]), "not text"),
        (pa.array([{"text": "a"}]), "not text"),
    ]:
        pq.write_table(pa.table({"text": array}), file)
        assert what in error(file)
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"])
    pq.write_table(twice, file)
    assert "more than one column data.text_field='text'" in error(file)
    not_utf8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"ok", b"\xff"]).buffers())
    pq.write_table(pa.table({"text": not_utf8}), file)
    assert f"{file}:2: the column is text, but this row is not UTF-8" == error(file)


def config(*given, **changes):
    return dataclasses.replace(DataConfig(sources=given), **changes)


def test_bad_records_are_skipped_and_counted_when_asked(tmp_path, monkeypatch):
    good = '{"text": "%s"}'
    lines = [good % "a", '{"body": 1}', "nope", good % "b", '{"text": null}', '{"text": "\\ud800"}']
    (tmp_path / "x.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}\n[1]')
    source = f"x={tmp_path}/x.jsonl"
    with pytest.raises(DataError, match=r"x.jsonl:2: no field"):
        load_corpus(config(source))
    with pytest.warns(UserWarning, match="6 bad records of domain 'x' were skipped .*x.jsonl:2: "):
        corpus = load_corpus(config(source, skip_bad_records=True))
    assert {d.text for d in (*corpus.train["x"], *corpus.validation["x"])} == {"a", "b"}
    assert corpus.manifest["skipped_records"] == {"x": 6}
    monkeypatch.setattr(files, "MOST_RECORD_BYTES", 50)
    (tmp_path / "x.jsonl").write_text(as_lines([{"text": t} for t in ("a", "b" * 99, "c")]))
    with pytest.warns(UserWarning, match="x.jsonl:2: a line of more than"):
        corpus = load_corpus(config(source, skip_bad_records=True))
    assert {d.text for d in (*corpus.train["x"], *corpus.validation["x"])} == {"a", "c"}


def test_each_file_is_read_once_by_its_real_path(tmp_path):
    folder = tmp_path / "deep" / "er"
    folder.mkdir(parents=True)
    (folder / "a.txt").write_text("once")
    (folder / "loop").symlink_to(tmp_path)
    (tmp_path / "deep" / "loop").symlink_to("er/loop")
    (folder / "b.txt").symlink_to("a.txt")
    (tmp_path / "aa").symlink_to("deep/er")
    for pattern in ("**/*.txt", "**", "*/**/*.txt", "**/er/**/*.txt", "deep/er/**/a.txt"):
        found = [d.id for d in read(tmp_path / pattern)]  # pyright: ignore
        assert len(found) == 1, pattern
    assert [d.id for d in read(tmp_path / "**/*.txt")] == [f"{folder}/a.txt"]  # pyright: ignore


def test_patterns_match_what_glob_matches(tmp_path, monkeypatch):
    import glob

    for name in ("a.txt", "[x]/b.txt", "[x]/y/c.txt", ".hidden/d.txt", "y/.e.txt", "y/a**b/f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    for pattern in (
        *("**", "**/*", "**/*.txt", "./**/*.txt", "*/**", "**/**/*.txt", "**/y/**", "y/**/*", "a.txt"),
        *("[[]x]/**/*.txt", "y/a**b/*.txt", ".hidden/**", "**/.e.txt", "?.txt", "[[]x]/y/../**/c.txt"),
    ):  # fmt: skip
        want = {
            os.path.realpath(f) for f in glob.glob(pattern, recursive=True) if os.path.isfile(f)
        }
        assert {os.path.realpath(f) for f in files.find(pattern)} == want, pattern


def test_a_link_to_nothing_is_said(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to("annexed")
    assert f"{tmp_path}/b.txt: a broken link (to 'annexed')" in error(tmp_path / "*.txt")


def peak_megabytes(cfg) -> float:
    tracemalloc.start()
    try:
        load_corpus(cfg)
    except DataError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak / 2**20


@pytest.mark.parametrize("compression", [c for c in COMPRESS if c])
def test_max_bytes_bounds_what_is_held(tmp_path, compression):
    """64 MB of text in few bytes; chunks of 1 MB, their copies and xz's window of 8 MB may be held."""
    file = tmp_path / f"x.txt{compression}"
    file.write_bytes(COMPRESS[compression](b"word\n" * 210_000) * 64)
    cfg = config(f"x={file}", max_bytes=1000)
    assert peak_megabytes(cfg) < 20
    corpus = load_corpus(cfg)
    assert corpus.manifest["bytes"] == 1000
    (tmp_path / "u.txt").write_text("é" * 1000)
    for limit in range(500, 504):
        [document] = read(tmp_path / "u.txt", max_bytes=limit)
        assert len(document.text.encode()) >= limit - 1  # pyright: ignore


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz"])
def test_a_record_without_end_is_an_error_in_bounded_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "MOST_RECORD_BYTES", 3 << 20)
    monkeypatch.setattr(sources, "MOST_RECORD_BYTES", 3 << 20)
    head = b'{"text": "' if "jsonl" in name else b'[{"text": "'
    (tmp_path / name).write_bytes(gzip.compress(head + b"x" * (64 << 20)))
    what = (
        "a line of more than 3,145,728 bytes" if "jsonl" in name else "no whole JSON value within"
    )
    assert what in error(tmp_path / name)
    # The record as bytes and as text, and twice while it is put together.
    assert peak_megabytes(config(f"x={tmp_path}/{name}")) < 30


def test_a_line_without_end_is_said_at_once(tmp_path, monkeypatch):
    """Not after a search for its end; what follows it is read."""
    monkeypatch.setattr(files, "MOST_RECORD_BYTES", 9)
    read_so_far = 0

    def counted(file, most=0):
        nonlocal read_so_far
        for chunk in pieces(file, 4):
            read_so_far += len(chunk)
            yield chunk

    monkeypatch.setattr(files, "chunks", counted)
    (tmp_path / "x").write_bytes(b"a\n" + b"x" * 10_000 + b"\nbb\n" + b"y" * 10 + b"\n" + b"z" * 9)
    stream = files.lines(str(tmp_path / "x"))
    assert [next(stream), next(stream)] == [(1, 0, b"a"), (2, 2, None)] and read_so_far < 20
    assert list(stream) == [(3, 10_003, b"bb"), (4, 10_006, None), (5, 10_017, b"z" * 9)]


def test_time_is_bounded_where_there_is_no_text(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALL", 1 << 20)
    monkeypatch.setattr("moejax.data.corpus._MOST_EMPTY", 1000)
    blank = tmp_path / "x.jsonl.gz"
    blank.write_bytes(gzip.compress(as_lines(RECORDS[:1]).encode() + b"\n" * (3 << 20)))
    assert "1,048,676 bytes hold less text than data.max_bytes" in error(blank, max_bytes=1)
    assert texts(blank) == ["story 0 "]
    (tmp_path / "e.jsonl").write_text('{"text": ""}\n' * 1002)
    with pytest.raises(DataError, match="1,000 records of domain 'e' have no text"):
        load_corpus(config(f"e={tmp_path}/e.jsonl", max_bytes=5))


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path):
    """A thousand rows of one text of 1 MB are 1 GB; eight of them are held."""
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 1000, pa.int32()), pa.array(["x" * 10**6]))
    pq.write_table(pa.table({"text": one}), tmp_path / "x.parquet")
    before = pa.total_allocated_bytes()
    stream = iter(read_documents(f"{tmp_path}/x.parquet", "text"))
    for _ in itertools.islice(stream, 20):
        assert pa.total_allocated_bytes() - before < 60 << 20
    stream.close()  # pyright: ignore


def test_parquet_bombs_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_SMALL", 1 << 20)
    table = pa.table({"text": ["x" * (4 << 20)]})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
    assert "more than 200 times as much: real text never does" in error(tmp_path / "x.parquet")

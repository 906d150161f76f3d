"""Traces: what the layers chose, in every format, piece by piece; hostile files are refused by name."""

import io
import json
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moejax.commands import routes
from moejax.config import ConfigError
from moejax.evals import trace, trace_files, trace_read
from moejax.evals.evaluate import open_text
from moejax.evals.routes import routes_of
from moejax.evals.trace import Records

HEADER = {
    "format": "moejax.routes",
    "version": 1,
    "num_experts": 4,
    "experts_per_token": 2,
    "layers": [0, 1, 2],
}
TEXTS = ["a", '"\n', "\ufffd", "</script>"]


def made(tokens: int, first_row: int = 0, seed: int = 0) -> Records:
    """Records of rows of 5 tokens with 3 layers and at most 2 of 4 experts."""
    rng = np.random.default_rng(seed)
    experts = rng.permuted(np.tile(np.arange(4), (tokens, 3, 1)), axis=-1)[..., :2]
    experts[0, 0, 1] = -1
    margin = rng.random((tokens, 3)).astype(np.float32)
    margin[0, 1] = np.nan
    weights = rng.random((tokens, 3, 2)).astype(np.float32)
    row = first_row + np.arange(tokens) // 5
    return Records(row, np.ones(tokens, int), rng.integers(0, 4, tokens), experts, weights, margin)


def test_margin_is_the_last_chosen_over_the_best_other():
    scores = jnp.array([[[0.1, 0.6, 0.2, 0.5], [0.1, 0.6, 0.2, 0.5], [1.0, 2, 3, 4]]])
    # Ranked; a bias preferred expert 0; no expert. 4 is a special expert without a score.
    expert = jnp.array([[[1, 3, 4], [1, 0, -1], [-1, -1, -1]]])
    got = np.asarray(trace.margins(expert, scores))
    np.testing.assert_allclose(got, [[0.3, -0.4, np.nan]], rtol=1e-6)
    everyone = trace.margins(jnp.arange(4)[None, None], scores[:, :1])
    assert np.isnan(everyone).all()


def test_records_are_the_routes_of_the_layers(trained):
    run, batches, _, _ = open_text(trained)
    pieces = list(trace.trace(run, batches, (1,), most=200))
    got = Records(*(np.concatenate(field) for field in zip(*pieces)))
    assert len(pieces) == 2 and len(got.token_N) == 200  # 4 rows of 32 a batch
    assert got.row_N.tolist() == [i // 32 for i in range(200)]
    read = jax.jit(lambda batch: routes_of(*run[1:3], batch, run.cfg.model, run.cfg.compute))
    want = [read(b) for b in batches]
    experts = np.concatenate([r.expert_LTK[1] for r in want])[:200]
    np.testing.assert_array_equal(got.experts_NLK[:, 0], experts)
    weights = np.concatenate([r.weights_LTK[1] for r in want])[:200]
    np.testing.assert_allclose(got.weights_NLK[:, 0], weights, rtol=1e-5)
    bias = np.asarray(run.router_state["moe_blocks"]["expert_bias"][1])
    assert (bias != 0).any()
    scores = np.concatenate([r.scores_LTE[1] for r in want])[:200] + bias  # what is ranked
    has = (experts[:, :, None] == np.arange(8)).any(axis=1)
    margin = np.where(has, scores, 9).min(1) - np.where(has, -9, scores).max(1)
    # Scores near 0.5 in another program: their differences are as exact as they are.
    np.testing.assert_allclose(got.margin_NL[:, 0], margin, atol=1e-6)
    assert (got.margin_NL > -1e-6).all()  # nothing but these values decides here
    documents = np.concatenate([b["segment_ids"].reshape(-1) for b in batches])[:200]
    np.testing.assert_array_equal(got.document_N, documents)


def test_padding_is_left_out():
    batch = trace.one_row([7, 8, 9], pad_id=0, length=5)
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 0]]
    out = np.zeros((5, 2, 1), int), np.zeros((5, 2, 1)), None
    got = trace.records_of(*out, batch, first_row=3)
    assert got.token_N.tolist() == [7, 8, 9] and got.row_N.tolist() == [3, 3, 3]
    assert got.margin_NL is None


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "npz"])
def test_a_trace_comes_back_from_every_format(tmp_path, kind):
    path = tmp_path / f"t.{kind}"
    # The second piece goes on in the middle of row 1.
    pieces = [made(7), made(6, 1, seed=1)._replace(row_N=np.array([1, 1, 1, 2, 2, 2]))]
    assert trace_files.write(path, kind, HEADER, iter(pieces), TEXTS) == 13
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    file = trace_read.open_trace(path)
    assert file.header == HEADER
    got = list(trace_read.rows(file, most=5))
    assert [(r.number, len(r.token_n)) for r in got] == [(0, 5), (1, 5), (2, 3)]
    for name, at in (("token_n", 2), ("experts_nLK", 3)):
        want = np.concatenate([p[at] for p in pieces])
        np.testing.assert_array_equal(np.concatenate([getattr(r, name) for r in got]), want)
    with pytest.raises(ConfigError, match=r"row 0 has more than the 4 tokens"):
        list(trace_read.rows(file, most=4))


def test_what_each_format_holds(tmp_path):
    records = made(5)
    for kind in ("jsonl", "parquet", "npz"):
        trace_files.write(tmp_path / f"t.{kind}", kind, HEADER, [records], TEXTS)
    lines = [json.loads(s) for s in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert lines[0] == HEADER and len(lines) == 6
    first = lines[1]
    assert first["text"] == TEXTS[first["token"]] and first["margin"][1] is None
    assert first["experts"] == records.experts_NLK[0].tolist()
    np.testing.assert_allclose(first["weights"], records.weights_NLK[0], atol=5e-7)  # 6 digits
    table = pq.read_table(tmp_path / "t.parquet").to_pylist()
    assert table[0]["experts"] == first["experts"] and table[0]["text"] == first["text"]
    np.testing.assert_array_equal(np.float32([t["margin"] for t in table]), records.margin_NL)
    with np.load(tmp_path / "t.npz", allow_pickle=False) as arrays:
        assert json.loads(bytes(arrays["header"])) == HEADER
        for name, want in zip(trace_files.ARRAYS, records):
            np.testing.assert_array_equal(arrays[name], want)


def test_a_trace_that_breaks_off_has_no_name(tmp_path):
    def broken():
        yield made(5)
        raise RuntimeError

    for kind in ("jsonl", "parquet", "npz"):
        with pytest.raises(RuntimeError):
            trace_files.write(tmp_path / f"t.{kind}", kind, HEADER, broken(), TEXTS)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# Hostile files.


def npz(path, **arrays):
    with zipfile.ZipFile(path, "w") as out:
        for name, value in arrays.items():
            data = io.BytesIO()
            np.lib.format.write_array(data, np.asarray(value))
            out.writestr(f"{name}.npy", data.getvalue())


def refused(path, match, most=8):
    with pytest.raises(ConfigError, match=match):
        list(trace_read.rows(trace_read.open_trace(path), most))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"format": "x"}, "no trace: its header must say"),
        ({"version": 2}, "version 2 of the format; 1 can be read"),
        ({"num_experts": 2**60}, "num_experts of the header"),
        ({"num_experts": True}, "num_experts of the header"),
        ({"experts_per_token": "2"}, "experts_per_token of the header"),
        ({"layers": []}, "layers of the header"),
        ({"layers": [0, -1]}, "layers of the header"),
    ],
)
def test_a_bad_header_is_refused(tmp_path, change, match):
    (tmp_path / "t.jsonl").write_text(json.dumps({**HEADER, **change}) + "\n")
    refused(tmp_path / "t.jsonl", match)


@pytest.mark.parametrize(
    "line, match",
    [
        ("[1", "t.jsonl:2: not JSON"),
        ("[" * 100_000, "t.jsonl:2: not JSON"),
        ("3", "expected an object"),
        ('{"row": 0, "token": 1}', r"experts of line 2 must be integers of shape \[3, 2\]"),
        ('{"row": 0, "token": 1, "experts": [[0, 1]]}', "experts of line 2"),
        ('{"row": 0, "token": 1, "experts": [[0, 1], [0], [1]]}', "experts of line 2"),
        ('{"row": 0, "token": 1, "experts": [[0.5, 1], [0, 1], [0, 1]]}', "experts of line 2"),
        ('{"row": true, "token": false, "experts": []}', "row and token of line 2"),
        (f'{{"row": 0, "token": {10**30}, "experts": []}}', "row and token of line 2"),
    ],
)
def test_a_bad_line_is_refused(tmp_path, line, match):
    (tmp_path / "t.jsonl").write_text(f"{json.dumps(HEADER)}\n{line}\n")
    refused(tmp_path / "t.jsonl", match)


def test_bad_arrays_are_refused(tmp_path):
    path = tmp_path / "t.npz"
    header = np.frombuffer(json.dumps(HEADER).encode(), np.uint8)
    good = dict(header=header, row=[0, 0], token=[1, 2], experts=np.zeros((2, 3, 2), int))
    npz(path, **good)
    assert len(list(trace_read.rows(trace_read.open_trace(path), 8))) == 1
    for change, match in (
        ({"experts": np.zeros((2, 2, 2), int)}, r"shape \[2, 2, 2\]; the header says \[N, 3, 2\]"),
        ({"experts": np.zeros((2, 3, 2))}, "experts is float64; it must be integers"),
        ({"token": np.array([{}, {}], object)}, "must be integers"),
        ({"token": [1]}, "differ in length"),
        ({"row": [1, 0]}, "row 0 comes after row 1"),
    ):
        npz(path, **{**good, **change})
        refused(path, match)
    npz(path, header=header)
    refused(path, "cannot be read as a trace")
    # An array that says it is larger than it is: read in pieces, it is not believed.
    data = io.BytesIO()
    about = {"descr": "<i8", "fortran_order": False, "shape": (1 << 40,)}
    np.lib.format.write_array_header_1_0(data, about)
    experts = io.BytesIO()
    about = {"descr": "<i8", "fortran_order": False, "shape": (1 << 40, 3, 2)}
    np.lib.format.write_array_header_1_0(experts, about)
    npz(path, header=header)
    with zipfile.ZipFile(path, "a") as out:
        out.writestr("row.npy", data.getvalue())
        out.writestr("token.npy", data.getvalue())
        out.writestr("experts.npy", experts.getvalue())
    refused(path, "it ends too early")
    path.write_bytes(b"PK nothing")
    refused(path, "cannot be read as a trace")


def test_a_bad_table_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    about = {b"moejax.routes": json.dumps(HEADER).encode()}
    good = {"row": [0], "token": [1], "experts": [[[0, 1]] * 3]}
    for change, match in (
        ({"experts": [[[0, 1]] * 2]}, "a token has not 3 layers"),
        ({"experts": [[[0, 1], [0], [0, 1]]]}, "a token has not 2 experts"),
        ({"experts": ["x"]}, "lists of lists of integers"),
        ({"experts": [[[0.5, 1.0]] * 3]}, "must be integers"),
        ({"token": [None]}, "must be integers"),
    ):
        table = pa.table({**good, **change}).replace_schema_metadata(about)
        pq.write_table(table, path)
        refused(path, match)
    pq.write_table(pa.table(good), path)
    refused(path, "no trace")
    path.write_bytes(b"PAR1 nothing")
    refused(path, "cannot be read as a trace")
    refused(tmp_path / "t.txt", "a trace is called")
    refused(tmp_path / "none.npz", "cannot be read as a trace")


# --------------------------------------------------------------------------------------------------
# The command.


def test_the_command_shows_and_writes(trained, tmp_path, capsys):
    run = f"--workdir={trained}"
    assert routes.main([run, "--text=abc def", "--layers=1"]) == 0
    shown = capsys.readouterr().out
    assert "<bos>" in shown and "layer 1" in shown and "layer 0" not in shown
    assert "1 of 2 MoE layers" in shown and "margin: " in shown
    out = tmp_path / "t.parquet"
    assert routes.main([run, "--prompt=a b", "--max_new=5", f"--out={out}"]) == 0
    assert "2 MoE layers" in capsys.readouterr().out
    rows = pq.read_table(out).to_pylist()
    assert [r["text"] for r in rows[:4]] == ["<bos>", "a", " ", "b"] and len(rows) == 9
    (tmp_path / "x.txt").write_text("a b c d\n" * 40)
    source = f"--sources=x={tmp_path / 'x.txt'}"
    assert (
        routes.main([run, source, "--tokens=40", "--format=jsonl", "--step=10", "--layers=1"]) == 0
    )
    lines = [json.loads(s) for s in capsys.readouterr().out.splitlines()]
    assert lines[0]["step"] == 10 and lines[0]["layers"] == [1] and len(lines) == 41
    assert {line["row"] for line in lines[1:]} == {0, 1}


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--text=a", "--prompt=b"], "cannot be used together"),
        (["--chat"], "--chat needs --prompt"),
        (["--layers=0,2"], "2 is not an MoE layer; they are numbered 0 to 1"),
        (["--layers=x"], "must be numbers"),
        (["--out=x.csv"], "the ending says no format"),
        (["--format=npz"], "needs --out=FILE"),
        (["--out=/nowhere/x.npz"], "there is no such folder"),
        (["--step=3"], "no checkpoint of step 3"),
        (["--text=a", "--batch_size=2"], "this text is one row"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(trained, flags, match, monkeypatch):
    monkeypatch.setattr("moejax.runs.restore.abstract_model", None)
    with pytest.raises(ConfigError, match=match):
        routes.main([f"--workdir={trained}", *flags])


def test_a_text_longer_than_the_model_reads_is_refused(trained):
    with pytest.raises(ConfigError, match=r"--sources=FILE cuts a longer one into rows"):
        routes.main([f"--workdir={trained}", f"--text={'a' * 5000}"])


@pytest.mark.product
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "npz"])
def test_a_million_tokens_need_no_more_memory_than_the_first(tmp_path, kind):
    """In a process of its own: the high-water mark after 50 batches, and after twenty times as many."""
    program = f"""
import pathlib, resource, sys
sys.path[:0] = ["tests/evals"]
from test_trace import HEADER, TEXTS, made
from moejax.evals import trace_files, trace_read

def run(pieces):
    path = pathlib.Path({str(tmp_path)!r}) / "t.{kind}"
    of = (made(1000, 200 * i) for i in range(pieces))
    number = trace_files.write(path, {kind!r}, HEADER, of, TEXTS)
    rows = sum(1 for _ in trace_read.rows(trace_read.open_trace(path), 5))
    assert rows * 5 == number == 1000 * pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

few = run(50)
print(run(1000) - few)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # MiB; the files are of 30 to 200. Allocators keep a little of what they are given back.
    assert float(done.stdout) < 25

"""evaluate --replay: a run that replays its own routes has its loss to the last bit; others are refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.commands import evaluate, generate, routes
from moejax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from moejax.evals import trace_files, trace_read
from moejax.evals.evaluate import evaluate_run, open_text
from moejax.evals.generate import generate as generate_ids
from moejax.evals.trace import Records
from moejax.evals.trace_replay import Told, replayed
from moejax.evals.writer import Writer
from moejax.models import transformer
from moejax.models.loss import loss_fn


@pytest.fixture(scope="module")
def traces(trained, tmp_path_factory):
    """The trained run's routes on its held-out text, as npz and JSON lines."""
    folder = tmp_path_factory.mktemp("traces")
    for kind in ("npz", "jsonl"):
        assert routes.main([f"--workdir={trained}", f"--out={folder}/own.{kind}"]) == 0
    return folder


def changed(path, out, header=(), change=lambda rows: rows):
    """A trace with another header or other rows [(row, token, experts), ..]."""
    file = trace_read.open_trace(path)
    rows = [
        (r.number, t, e)
        for r in trace_read.rows(file, 32)
        for t, e in zip(r.token_n, r.experts_nLK)
    ]
    row, token, experts = map(np.array, zip(*change(rows)))
    records = Records(row, np.ones_like(row), token, experts, None, None)
    # As another engine would: no weights, no margins.
    trace_files.write(out, "jsonl", {**file.header, **dict(header)}, [records], [])


def test_own_routes_give_the_same_loss_to_the_last_bit(trained, traces):
    want = evaluate_run(trained)
    assert evaluate_run(trained, replay=traces / "own.npz") == want


def test_routes_of_another_checkpoint_change_the_loss(trained, traces, tmp_path, capsys):
    out = f"{tmp_path}/early.npz"
    assert routes.main([f"--workdir={trained}", "--step=10", f"--out={out}"]) == 0
    assert evaluate.main([f"--workdir={trained}", f"--replay={out}"]) == 0
    late = evaluate_run(trained)["loss"]
    assert evaluate_run(trained, replay=tmp_path / "early.npz")["loss"] != late
    own = evaluate_run(trained, step=10)
    assert evaluate_run(trained, step=10, replay=tmp_path / "early.npz") == own


def test_a_trace_of_another_engine_needs_only_ids_and_experts(trained, traces, tmp_path):
    lines = (traces / "own.jsonl").read_text().splitlines()
    header = {
        k: v
        for k, v in json.loads(lines[0]).items()
        if k in ("format", "version", "num_experts", "experts_per_token", "layers")
    }
    few = [
        {k: v for k, v in json.loads(s).items() if k in ("row", "token", "experts")}
        for s in lines[1:]
    ]
    path = tmp_path / "engine.jsonl"
    path.write_text("\n".join(json.dumps(v) for v in [header, *few]))
    assert evaluate_run(trained, replay=path) == evaluate_run(trained)


def test_training_takes_the_routes_of_a_trace(trained, traces):
    """The example of docs/routes.md: its routes are taken, gradients go through the weights."""
    run, batches, _, _ = open_text(trained)

    @jax.jit
    @jax.grad
    def gradient(params, batch):
        return loss_fn(params, run.router_state, batch, run.cfg.model, objective=run.cfg.objective)[
            0
        ]

    file = trace_read.open_trace(traces / "own.npz")
    batch = next(iter(replayed(batches, file, run.cfg.model)))
    other = {**batch, "routes": 7 - batch["routes"] % 8}  # what a trace may say, too
    grads = [
        gradient(run.params, b)["moe_blocks"]["moe"]["router"]["kernel"] for b in (batch, other)
    ]
    assert all((np.asarray(g) != 0).any() for g in grads)
    plain = {k: v for k, v in batch.items() if k != "routes"}
    want = gradient(run.params, plain)["moe_blocks"]["moe"]["router"]["kernel"]
    np.testing.assert_allclose(
        grads[0], want, rtol=1e-5, atol=1e-8
    )  # its own routes: the same step
    assert np.abs(np.asarray(grads[1]) - want).max() > 1e-6


def other_token(rows):
    rows[40] = (rows[40][0], (rows[40][1] + 1) % 256, rows[40][2])
    return rows


def twice(rows):
    rows[40][2][1] = 3
    return rows


def too_large(rows):
    rows[40][2][0, 0] = 8
    return rows


@pytest.mark.parametrize(
    "header, change, match",
    [
        ({"num_experts": 16}, list, "has num_experts=16, this model 8"),
        ({"tokenizer": "sha256:0"}, list, "has tokenizer=sha256:0, this model byte"),
        ({"layers": [0, 2]}, list, "a trace that is replayed needs every layer"),
        ({}, lambda rows: rows[:-1], r"row 7 has 31 tokens, that of the text 32"),
        ({}, lambda rows: rows[:96], "ends before row 3 of the text"),
        ({}, lambda rows: rows[32:], "has row 1 where the text has row 0"),
        ({}, other_token, r"row 1 is of another text: its token 8 is \d+, that of the text"),
        ({}, twice, r"rows 0 to 3: .*names expert 3 twice .*row 1, position 8, MoE layer 1"),
        ({}, too_large, r"names expert 8 .*there are 0 to 7"),
    ],
)
def test_another_trace_is_refused_before_weights_are_read(
    trained, traces, tmp_path, header, change, match, monkeypatch
):
    changed(traces / "own.npz", tmp_path / "t.jsonl", header, change)
    monkeypatch.setattr("moejax.evals.evaluate.load_run", None)
    with pytest.raises(ConfigError, match=match):
        evaluate_run(trained, replay=tmp_path / "t.jsonl")


# --------------------------------------------------------------------------------------------------
# One text is written again.

PROMPT = ["--prompt=abc ", "--max_new=12", "--greedy"]


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """The trace of a text that the run wrote, and what it wrote."""
    out = tmp_path_factory.mktemp("written") / "own.jsonl"
    flags = [f for f in PROMPT if f != "--greedy"]
    assert routes.main([f"--workdir={trained}", f"--out={out}", *flags]) == 0
    return out


def test_a_text_is_written_again_with_its_routes(trained, written, capsys):
    lines = [json.loads(line) for line in written.read_text().splitlines()[1:]]
    text = "".join(line["text"] for line in lines)
    flags = [f"--workdir={trained}", *PROMPT[:2], "--temperature=0.8"]
    capsys.readouterr()
    assert generate.main([*flags, f"--replay={written}"]) == 0
    out, err = capsys.readouterr()
    assert not err and len(lines) == 5 + 12
    assert out.strip("\n") in text and generate.main(flags) == 0
    assert capsys.readouterr().out == out


def test_told_routes_are_taken_in_prefill_and_in_decoding():
    """All tokens through experts 6 and 7 of a model whose experts matter: what it writes is what a forward pass
    over the same text chooses that is told so, and not what free routes would choose."""
    moe = MoEConfig(num_experts=8, experts_per_token=2, d_expert=16)
    attention = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8)
    cfg = ModelConfig(
        vocab_size=64, d_model=16, num_layers=3, d_ff=32, init_std=0.5, attention=attention, moe=moe
    )
    params, state = transformer.init_model(cfg, jax.random.key(0))
    prompt, new = [3, 7, 1, 30, 2], 12
    told_LNK = np.broadcast_to(np.int32([6, 7]), (2, len(prompt) + new, 2))
    told = Told(pathlib.Path("x"), np.zeros(0, np.int32), told_LNK)
    [ids] = generate_ids(params, told.with_state(state), cfg, [prompt], new)
    text_BS = np.array([[*prompt, *ids]])

    def best(**routes):
        out = transformer.forward(params, state, text_BS, cfg, **routes)
        logits_SV = transformer.logits(params, out.hidden_BSD)[0]
        return np.asarray(logits_SV.argmax(axis=-1))[len(prompt) - 1 : -1]

    want, free = best(forced_LTK=jnp.asarray(told_LNK)), best()
    assert ids == want.tolist()
    assert (want != free).sum() > new / 2 and (want != free)[0]  # the first is of the prefill


def test_a_text_ends_where_it_is_not_the_traces():
    told = Told(pathlib.Path("x"), np.array([5, 6, 7, 8, 9]), np.zeros((1, 5, 1), np.int32))
    assert told.kept(2, [7, 8]) == [7, 8]
    assert told.kept(2, [7, 1, 9]) == [
        7,
        1,
    ]  # what follows 1 was written with routes of another text
    assert told.kept(4, [9, 3]) == [9, 3]  # past its end nothing contradicts
    assert told.kept(2, []) == []


def test_a_run_says_where_it_leaves_a_trace(trained, written, tmp_path, capsys):
    """The trace's third new token is made another: the text ends there, and says so."""
    out = tmp_path / "other.jsonl"
    changed(
        written,
        out,
        change=lambda rows: [
            (r, (t + 1) % 256 if i == 7 else t, e) for i, (r, t, e) in enumerate(rows)
        ],
    )
    flags = [f"--workdir={trained}", *PROMPT[:2], "--temperature=0.8", f"--replay={out}"]
    assert generate.main(flags) == 0
    said, err = capsys.readouterr()
    assert "token 7 is not that of" in err
    assert len(said.rstrip("\n")) <= len("abc ") + 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--replay needs the --prompt"),
        (["--prompt=xyz"], "is of another text: its token 1 is"),
        (["--prompt=" + 30 * "a"], "has 17 tokens, fewer than the 31 of the prompt"),
        (["--prompt=abc ", "--speculative"], "--replay and --speculative cannot be used together"),
    ],
)
def test_what_cannot_be_written_again_is_refused(trained, written, flags, message):
    with pytest.raises(ConfigError, match=message):
        generate.main([f"--workdir={trained}", f"--replay={written}", *flags])


def test_a_trace_of_several_texts_is_refused_before_weights_are_read(trained, traces):
    with pytest.raises(
        ConfigError, match=r"own.npz is of several texts; .* moejax routes --prompt"
    ):
        Writer(trained, replay=traces / "own.npz")

"""A run that begins from another: what it takes, what does not fit, and that the base is left alone."""

import dataclasses
import hashlib
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.__main__ import main
from moejax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from moejax.data import load_corpus, validation_batches
from moejax.evals.report import provenance_section
from moejax.evals.validation import compile_eval, evaluate
from moejax.routers import router_options
from moejax.runs import folder, lock, provenance
from moejax.runs.metrics import read_metrics
from moejax.runs.open import load_run
from moejax.train.base import as_base, fingerprint, open_base
from moejax.train.loop import train

ROOT = pathlib.Path(__file__).parents[2]


def text(path, letters, seed) -> str:
    rng = np.random.default_rng(seed)
    for i in range(20):
        words = ["".join(rng.choice(list(letters), 5)) for _ in range(80)]
        (path / f"{letters}{i}.txt").write_text(" ".join(words))
    return f"text={path}/{letters}*.txt"


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """A config of its own model, trained on one text; and of the same that takes the model from elsewhere."""
    folder = tmp_path_factory.mktemp("text")
    own = ExperimentConfig(
        name="base",
        model=ModelConfig(
            d_model=16,
            num_layers=1,
            num_dense_layers=0,
            max_seq_len=64,
            attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
            moe=MoEConfig(
                num_experts=4, d_expert=8, router=router_options(score="sigmoid", expert_bias=True)
            ),
        ),
        objective=ObjectiveConfig(bias_update="sign", bias_rate=0.1),
        data=DataConfig(
            sources=(text(folder, "abcd", 0),),
            vocab_size=300,
            seq_len=32,
            batch_size=8,
            validation_fraction=0.2,
        ),
        optimizer=OptimizerConfig(warmup_steps=1, schedule="constant"),
        train=TrainConfig(steps=2, log_every=1, eval_every=9, eval_batches=2, checkpoint_every=1),
        mesh=MeshConfig(data=1),
    )
    return own, (text(folder, "bcde", 1),)


@pytest.fixture(scope="module")
def base(cfg, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base") / "run"
    train(cfg[0], workdir)
    return workdir


def begun(cfg, init_from, **changes) -> ExperimentConfig:
    """An experiment on the other text that says nothing of its model, objective and tokenizer."""
    own, sources = cfg
    data = dataclasses.replace(
        DataConfig(sources=sources), seq_len=32, batch_size=8, validation_fraction=0.2
    )
    new = ExperimentConfig(
        name="new",
        data=data,
        optimizer=own.optimizer,
        train=dataclasses.replace(own.train, init_from=str(init_from)),
        mesh=own.mesh,
    )
    return dataclasses.replace(as_base(new, None), **changes)


def loss_of(run, data) -> float:
    """Of a run as it stands, on the first 16 rows held out from a text."""
    corpus = load_corpus(data)
    batches = validation_batches(corpus, run.tokenizer, data, 16)
    eval_fn = compile_eval(run.cfg, num_domains=1)
    return evaluate(eval_fn, run.params, run.router_state, batches, corpus.domains)[0]["loss"]


def contents(path) -> dict[str, str]:
    return {
        str(
            p.relative_to(path)
        ): f"{p.stat().st_mtime_ns} {hashlib.sha256(p.read_bytes()).hexdigest()}"
        for p in sorted(path.rglob("*"))
        if p.is_file()
    }


def test_a_run_begins_from_another_and_leaves_it_alone(cfg, base, tmp_path, capsys):
    there = tmp_path / "base"
    shutil.copytree(base, there)
    before, was = contents(there), load_run(base)
    new = begun(cfg, there)
    assert new.model == was.cfg.model and new.objective == cfg[0].objective
    train(new, tmp_path / "new")
    assert contents(there) == before
    out = capsys.readouterr()
    assert f"beginning from {there}, step 2" in out.out
    written = read_metrics(tmp_path / "new")
    assert list(written["train"]) == [1, 2] and list(written["validation"]) == [0, 2]
    # Before the first step it is the base: its loss on this text with its tokenizer, computed here.
    loss = loss_of(was, new.data)
    # The same program and arrays.
    assert written["validation"][0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert f"before training: validation loss {loss:.4f}" in out.out
    # The optimiser, the data and the schedule began anew: its warm-up is one step.
    rate = new.optimizer.learning_rate
    assert [r["learning_rate"] for r in written["train"].values()] == pytest.approx([rate, rate])
    assert (tmp_path / "new/tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    # It says where it comes from.
    whole = fingerprint(was.params, was.router_state)
    [start, _] = provenance.read(tmp_path / "new")
    assert (start["base"], start["base_sha256"]) == (f"{there}, step 2", whole)
    assert f"began from {there}, step 2 (sha256 of its weights {whole[:16]})" in (
        provenance_section(tmp_path / "new").text
    )
    stored = json.loads((tmp_path / "new/config.json").read_text())
    assert stored["train"]["init_from"] == str(there)
    # It goes on without the base, by the same words; and from nothing else.
    shutil.rmtree(there)
    longer = dataclasses.replace(new.train, steps=3)
    unsaid = dataclasses.replace(
        new,
        model=ModelConfig(),
        objective=ObjectiveConfig(),
        data=dataclasses.replace(new.data, vocab_size=DataConfig.vocab_size),
        train=longer,
    )
    assert as_base(unsaid, tmp_path / "new") == dataclasses.replace(new, train=longer)
    train(dataclasses.replace(new, train=longer), tmp_path / "new")
    assert "at step 2" in capsys.readouterr().out
    assert list(read_metrics(tmp_path / "new")["validation"]) == [0, 2, 3]
    for other in ("", str(base)):
        changed = dataclasses.replace(new, train=dataclasses.replace(longer, init_from=other))
        with pytest.raises(ConfigError, match=r"train\.init_from: '.*' there, '.*' now"):
            train(changed, tmp_path / "new")
    with pytest.raises(ConfigError, match=r"there is no folder .*base; expected the folder of a"):
        train(new, tmp_path / "another")


@pytest.mark.product
def test_any_checkpoint_on_any_mesh(cfg, base, tmp_path):
    """Step 1 of the base, sharded over eight devices, and with frozen parameters."""
    spread = begun(
        cfg,
        base / "checkpoints" / "1",
        mesh=MeshConfig(data=2, expert=2, tensor=2),
        optimizer=dataclasses.replace(cfg[0].optimizer, groups=("path=*/experts/* frozen",)),
    )
    spread = dataclasses.replace(spread, train=dataclasses.replace(spread.train, steps=1))
    _, there = open_base(spread, tmp_path / "new")
    params, state = there.load(None)
    assert there.name == f"{base}, step 1"
    newest = load_run(base)
    assert not np.array_equal(params["embed"]["tokens"], newest.params["embed"]["tokens"])
    train(spread, tmp_path / "new")
    assert provenance.read(tmp_path / "new")[0]["base_sha256"] == fingerprint(params, state)
    after = load_run(tmp_path / "new")
    frozen, moved = (p["moe_blocks"]["moe"]["experts"]["w_up"] for p in (params, after.params))
    np.testing.assert_array_equal(frozen, moved)
    assert not np.array_equal(params["embed"]["tokens"], after.params["embed"]["tokens"])


def test_what_does_not_fit_is_named_before_anything_is_computed(cfg, base, tmp_path):
    good, new = begun(cfg, base), tmp_path / "new"
    vocab = load_run(base).cfg.model.vocab_size

    def refused(message, **groups):
        changed = {
            group: dataclasses.replace(getattr(good, group), **values)
            for group, values in groups.items()
        }
        with pytest.raises(ConfigError, match=message):
            train(dataclasses.replace(good, **changed), new)
        assert not new.exists()

    refused(
        r"model\.d_model: 16 there, 32 here\n--config\.model\.d_model=16 would work",
        model=dict(d_model=32),
    )
    refused(rf"model\.vocab_size: {vocab} there, 512 here", model=dict(vocab_size=512))
    refused(r"mtp_depth: 0 there, 1 here\n.*neither added nor removed", model=dict(mtp_depth=1))
    refused(
        r"experts_per_token: 2 there, 1 here",
        model=dict(moe=dataclasses.replace(good.model.moe, experts_per_token=1)),
    )
    refused(r"data\.tokenizer: 'bpe' there, 'byte' here", data=dict(tokenizer="byte"))
    refused(r"data\.vocab_size: 300 there, 400 here", data=dict(vocab_size=400))
    other = tmp_path / "tokenizer.json"
    other.write_text((base / "tokenizer.json").read_text() + " ")
    refused(
        r"data\.tokenizer: 'bpe' there, '.*/tokenizer\.json' here", data=dict(tokenizer=str(other))
    )
    # Left to the tokenizer, the vocabulary is the base's; the same tokenizer may have another name.
    same = tmp_path / "same"
    same.mkdir()
    shutil.copy(base / "tokenizer.json", same)
    said = dataclasses.replace(
        good,
        model=dataclasses.replace(good.model, vocab_size=0),
        data=dataclasses.replace(good.data, tokenizer=str(same)),
    )
    assert open_base(said, new)[0].model == good.model


def test_bases_that_cannot_be_one_are_named(cfg, base, tmp_path):
    new = tmp_path / "new"

    def refused(message, init_from, workdir=new):
        changed = begun(cfg, base)
        changed = dataclasses.replace(
            changed, train=dataclasses.replace(changed.train, init_from=str(init_from))
        )
        with pytest.raises(ConfigError, match=message):
            train(changed, workdir)
        assert not new.exists()

    refused("is no such checkpoint; .* has 1, 2", base / "checkpoints" / "7")
    (tmp_path / "empty").mkdir()
    refused("empty: expected the folder of a run", tmp_path / "empty")
    (tmp_path / "empty/checkpoints").mkdir()
    refused("it has no checkpoint yet", tmp_path / "empty")
    refused("are one folder: a base is only read", base, base)
    refused("are one folder: a base is only read", base / "checkpoints" / "1", base / "inside")
    with lock.writing(base):
        refused(r"is being trained \(process .*checkpoints/2", base)
        assert open_base(begun(cfg, base / "checkpoints" / "2"), new)[1].name.endswith("step 2")
    damaged = tmp_path / "damaged"
    shutil.copytree(base, damaged)
    for file in (damaged / "checkpoints/2/model").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"checkpoints/2 cannot be read .*other checkpoints there: 1"
    ):
        open_base(begun(cfg, damaged), new)[1].load(None)
    (damaged / "config.json").write_text("{")
    refused("is not JSON", damaged)


def test_an_import_is_not_trained_in_its_own_folder(cfg, base, tmp_path):
    run = load_run(base)
    folder.claim_workdir(tmp_path, run.cfg, run.tokenizer)
    (tmp_path / "checkpoints" / "0").mkdir(parents=True)
    own = dataclasses.replace(cfg[0], model=run.cfg.model)
    with pytest.raises(
        ConfigError, match=r"imported model, which training would replace: .*init_from="
    ):
        train(own, tmp_path)


def test_a_fingerprint_knows_every_array_and_no_dtype():
    params = {"a": jnp.arange(4.0), "b": jnp.ones((2, 2))}
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    assert fingerprint(params, {}) == fingerprint(half, {})
    assert fingerprint(params, {}) != fingerprint({**params, "a": params["a"][::-1]}, {})
    assert fingerprint({"a": params["a"]}, {}) != fingerprint({}, {"a": params["a"]})


def test_the_command_of_fine_tuning_takes_a_run_trained_here(cfg, base, tmp_path):
    """Its tokenizer, its model and its weights: before a step the losses are the base's."""
    new = tmp_path / "new"
    flags = {
        "data.sources": repr(cfg[1]),
        "data.validation_fraction": 0.2,
        "data.seq_len": 32,
        "data.batch_size": 8,
        "mesh.data": 1,
        "train.steps": 1,
        "train.eval_every": 1,
        "train.eval_batches": 2,
        "optimizer.warmup_steps": 1,
    }
    argv = [f"--config.{key}={value}" for key, value in flags.items()]
    finetune = f"--config={ROOT / 'experiments/finetune.py'}:{base}"
    assert main(["train", "--noreport", finetune, f"--workdir={new}", *argv]) == 0
    assert (new / "tokenizer.json").read_text() == (base / "tokenizer.json").read_text()
    was, now = load_run(base), load_run(new)
    assert now.cfg.model == was.cfg.model
    loss = loss_of(was, now.cfg.data)
    assert read_metrics(new)["validation"][0]["loss"] == pytest.approx(loss, rel=1e-6)
    # A step of Adam moves no weight by more than its rate.
    moved = jax.tree.map(lambda a, b: abs(a - b).max(), was.params, now.params)
    assert 0 < max(jax.tree.leaves(moved)) < 1.01 * now.cfg.optimizer.learning_rate

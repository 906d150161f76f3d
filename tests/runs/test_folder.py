"""A run's folder belongs to one config and one text; whatever is damaged in it is named."""

import dataclasses
import json

import pytest

from moejax.config import (
    ComputeConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
)
from moejax.data.corpus import Corpus
from moejax.data.sources import Document
from moejax.data.tokenizer import ByteTokenizer, load_tokenizer, train_bpe
from moejax.runs import folder
from moejax.runs.metrics import read_metrics

CFG = ExperimentConfig(
    model=ModelConfig(vocab_size=32, d_model=16), data=DataConfig(tokenizer="byte")
)


def test_what_is_claimed(tmp_path):
    """A byte tokenizer is its name in the config; another is kept, and read back without its file."""
    folder.claim_workdir(tmp_path / "a", CFG, ByteTokenizer())
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["config.json"]
    source = tmp_path / "theirs.json"
    text = (Document("f", 1, "some text"),)
    source.write_text(train_bpe(Corpus({"d": text}, {"d": text}, (1.0,), {}), 258))
    theirs = load_tokenizer(DataConfig(tokenizer=str(source)))
    folder.claim_workdir(tmp_path / "b", CFG, theirs, {"sha256": "0"})
    names = {p.name for p in (tmp_path / "b").iterdir()}
    assert names == {"config.json", "tokenizer.json", "corpus.json"}
    assert (tmp_path / "b" / folder.TOKENIZER).read_text() == source.read_text()


def test_a_workdir_belongs_to_one_config(tmp_path):
    folder.claim_workdir(tmp_path, CFG)
    with pytest.raises(ConfigError, match=r"model.vocab_size: 32 there, 64 now"):
        model = dataclasses.replace(CFG.model, vocab_size=64)
        folder.claim_workdir(tmp_path, dataclasses.replace(CFG, model=model))
    # A longer run, on another mesh, computed in another way is the same run.
    moved = dataclasses.replace(
        CFG,
        compute=ComputeConfig(remat="full"),
        train=dataclasses.replace(CFG.train, steps=999),
        mesh=MeshConfig(data=1, fsdp=8),
    )
    folder.claim_workdir(tmp_path, moved)
    folder.claim_workdir(tmp_path, CFG)


def saved_step(workdir, step):
    (workdir / "checkpoints" / str(step)).mkdir(parents=True)


def test_what_a_run_began_from_is_part_of_it(tmp_path):
    other = dataclasses.replace(CFG, train=dataclasses.replace(CFG.train, init_from="runs/a"))
    folder.claim_workdir(tmp_path, other, files={"hf/config.json": b"{}"})
    assert (tmp_path / "hf/config.json").read_bytes() == b"{}"
    longer = dataclasses.replace(other, train=dataclasses.replace(other.train, steps=999))
    folder.claim_workdir(tmp_path, longer)
    with pytest.raises(ConfigError, match=r"train\.init_from: 'runs/a' there, '' now"):
        folder.claim_workdir(tmp_path, CFG)


def test_an_imported_model_is_not_trained_in_place(tmp_path):
    folder.claim_workdir(tmp_path, CFG)
    saved_step(tmp_path, 0)
    with pytest.raises(ConfigError, match=r"with --config\.train\.init_from="):
        folder.claim_workdir(tmp_path, CFG)
    saved_step(tmp_path, 1)  # as 0.1.0 did
    folder.claim_workdir(tmp_path, CFG)


def test_a_workdir_that_cannot_be_used_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"--workdir=.*file/run cannot be written: Not a directory"
    ):
        folder.claim_workdir(tmp_path / "file" / "run", CFG)


@pytest.mark.parametrize(
    "content, text",
    [
        (b"{", "config.json is not JSON"),
        (b"\xff", "config.json is not JSON"),
        (b"5", "config.json is not the config of a run"),
        (b"{}", "config.json is not the config of a run"),
        (None, "has no config.json"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, content, text):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ConfigError, match=text):
            folder.claim_workdir(tmp_path, CFG)
    with pytest.raises(ConfigError, match=text):
        folder.read_config_values(tmp_path)


def test_another_text_is_noticed_on_resuming(tmp_path):
    def manifest(sums):
        return {"sha256": str(sums), "domains": {d: {"sha256": s} for d, s in sums.items()}}

    (tmp_path / "corpus.json").write_text(json.dumps(manifest({"a": 1, "b": 2})))
    folder.check_corpus(tmp_path, manifest({"a": 1, "b": 3}))  # nothing was trained on it
    saved_step(tmp_path, 4)
    folder.check_corpus(tmp_path, manifest({"a": 1, "b": 2}))
    with pytest.warns(UserWarning, match=r"trained on another text \(domains that differ: b, c;"):
        folder.check_corpus(tmp_path, manifest({"a": 1, "b": 3, "c": 4}))
    assert json.loads((tmp_path / "corpus.before.json").read_text())["domains"]["b"] == {
        "sha256": 2
    }


def test_metrics_of_a_crashed_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"step": 1, "kind": "train", "cross_entropy": 9.0},
        {"step": 2, "kind": "train", "cross_entropy": 8.0},
        {"step": 1, "kind": "validation", "loss": 1.0},
        {"step": 2, "kind": "train", "cross_entropy": 7.0},
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 3, "ki')
    got = read_metrics(tmp_path)
    assert [r["cross_entropy"] for r in got["train"].values()] == [9.0, 7.0]
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(ConfigError, match="no finished evaluation"):
        read_metrics(tmp_path)
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        read_metrics(tmp_path / "other")

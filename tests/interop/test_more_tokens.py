"""A tokenizer with a few tokens more than the model has rows."""

import jax
import numpy as np
import pytest
from test_import_export import checkpoint

from moejax.axes import VOCAB
from moejax.config import (
    ConfigError,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
)
from moejax.data.tokenizer import JsonTokenizer
from moejax.interop import convert
from moejax.interop.load import load_model
from moejax.interop.more_tokens import with_tokens
from moejax.mesh import RULES
from moejax.routers import router_options
from moejax.runs.open import load_run
from moejax.sharding import Layout, make_mesh
from moejax.train.base import as_base, open_base


def test_a_few_tokens_more_than_rows(tmp_path, capsys):
    """Their rows are the mean of the others, and known logits stay; such a run goes out, and is a base."""
    text = (checkpoint(tmp_path / "other", "mixtral") / "tokenizer.json").read_text()
    tokens = JsonTokenizer(text, "mine").vocab_size
    hf = checkpoint(tmp_path / "hf", "mixtral", vocab_size=tokens - 3)
    convert.import_run(hf, tmp_path / "run")
    said = f"has 3 tokens more than the model's {tokens - 3} rows: rows were added"
    assert said in capsys.readouterr().out
    few, run = load_model(hf), load_run(tmp_path / "run")
    assert run.cfg.model.vocab_size == run.cfg.data.vocab_size == tokens
    rows, columns = run.params["embed"]["tokens"], run.params["head"]
    np.testing.assert_array_equal(rows[:-3], few[1]["embed"]["tokens"])
    np.testing.assert_array_equal(columns[:, :-3], few[1]["head"])
    for got in (rows.astype("float32"), columns.T.astype("float32")):
        want = np.broadcast_to(got[:-3].mean(axis=0), got[-3:].shape)
        np.testing.assert_allclose(got[-3:], want, rtol=2**-8)  # they are stored in bfloat16
        assert np.abs(want).min() > 0
    convert.export_run(tmp_path / "run", tmp_path / "out")
    again = load_model(tmp_path / "out")
    np.testing.assert_array_equal(again[1]["head"], columns)
    cfg = as_base(ExperimentConfig(train=TrainConfig(init_from=str(hf))), None)
    cfg, of = open_base(cfg, tmp_path / "tuned")
    assert cfg.model.vocab_size == tokens
    capsys.readouterr()
    wide = of.load(None)[0]["head"]  # float32, the file is bfloat16: so are the run's means
    np.testing.assert_allclose(wide, columns.astype("float32"), rtol=2**-8)


def test_tables_of_token_ids_have_no_place_for_more():
    moe = MoEConfig(
        num_experts=4, d_expert=4, router=router_options("deepseek_v4_hash", hash_layers=1)
    )
    cfg = ModelConfig(vocab_size=100, num_layers=2, moe=moe)
    with pytest.raises(
        ConfigError, match="101 tokens, the model's tables of experts by token only"
    ):
        with_tokens(cfg, 101, "tokenizer.json")
    assert with_tokens(cfg, 100, "tokenizer.json") == cfg


def test_rows_that_a_mesh_cannot_split(tmp_path):
    """Those of the files are split before more are added. Where they can be, the values are the same."""
    text = (checkpoint(tmp_path / "other", "mixtral") / "tokenizer.json").read_text()
    tokens = JsonTokenizer(text, "mine").vocab_size
    assert tokens % 3 == 0
    rules = {**dict.fromkeys(RULES, ()), VOCAB: ("tensor",)}
    layout = Layout(make_mesh(MeshConfig(tensor=3), jax.devices()[:3]), tuple(rules.items()))
    source = convert.open_source(checkpoint(tmp_path / "two", "mixtral", vocab_size=tokens - 2))
    with pytest.raises(ConfigError, match=r"rows, which 3 devices cannot split.*moejax import"):
        convert.read_source(source, layout=layout)
    source = convert.open_source(checkpoint(tmp_path / "three", "mixtral", vocab_size=tokens - 3))
    alone, split = (
        convert.read_source(source, layout=where)[1]["head"] for where in (None, layout)
    )
    np.testing.assert_array_equal(alone, split)
    assert split.addressable_shards[0].data.shape[1] == tokens // 3

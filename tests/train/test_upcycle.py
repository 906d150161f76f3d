"""A mixture that begins as a dense model: what it computes, what is copied, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from moejax.models import transformer
from moejax.routers import router_options
from moejax.runs.metrics import read_metrics
from moejax.sharding import make_layout
from moejax.train import upcycle
from moejax.train.loop import train

DENSE = ModelConfig(
    vocab_size=64,
    d_model=16,
    num_layers=3,
    d_ff=24,
    init_std=0.1,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
)
COPIES = MoEConfig(
    num_experts=4,
    experts_per_token=2,
    d_expert=24,
    router=router_options(normalize_weights=True),
)


def mixture(**changes) -> ModelConfig:
    return dataclasses.replace(DENSE, **{"num_dense_layers": 1, "moe": COPIES, **changes})


def logits(cfg, params, state, tokens_BS):
    return transformer.logits(params, transformer.forward(params, state, tokens_BS, cfg).hidden_BSD)


@pytest.mark.parametrize("layers", [{}, {"dense_at": (1,)}, {"num_dense_layers": 0}], ids=str)
@pytest.mark.parametrize("biases", [False, True])
def test_it_computes_what_the_dense_model_computes(layers, biases):
    dense = dataclasses.replace(DENSE, ffn_bias=biases)
    cfg = mixture(**layers, ffn_bias=biases, moe=dataclasses.replace(COPIES, ffn_bias=biases))
    assert upcycle.begun_from(dense, cfg) == cfg
    with jax.enable_x64(True):
        params, _ = transformer.init_model(dense, jax.random.key(0))
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(1), len(leaves))  # nothing is zero or one
        params = tree.unflatten(
            [0.2 * jax.random.normal(k, a.shape, jnp.float64) for k, a in zip(keys, leaves)]
        )
        tokens_BS = jax.random.randint(jax.random.key(2), (2, 9), 0, 64)
        want = logits(dense, params, {}, tokens_BS)
        new, state = upcycle.upcycle(params, cfg, 7, None)
        got = logits(cfg, new, state, tokens_BS)
    # float64 hidden states, but weights of the router in float32: they add up to 1 within 1e-7.
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    copies = new["moe_blocks"]["moe"]["experts"]["w_up"]
    at = cfg.layers["moe_blocks"]
    for e in range(4):
        np.testing.assert_array_equal(
            copies[:, e], params["dense_blocks"]["ffn"]["w_up"][jnp.array(at)]
        )
    assert jax.tree.structure(new) == jax.tree.structure(
        transformer.param_specs(cfg), is_leaf=lambda x: hasattr(x, "axes")
    )


def test_the_router_is_that_of_a_run_from_scratch_with_this_seed():
    params, _ = transformer.init_model(DENSE, jax.random.key(0))
    for seed in (0, 1):
        fresh, _ = transformer.init_model(mixture(), jax.random.key(seed))
        new, _ = upcycle.upcycle(params, mixture(), seed, None)
        for a, b in zip(
            jax.tree.leaves(new["moe_blocks"]["moe"]["router"]),
            jax.tree.leaves(fresh["moe_blocks"]["moe"]["router"]),
            strict=True,
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6)  # one is compiled, the other is not


def test_on_a_mesh():
    cfg = ExperimentConfig(
        model=mixture(), data=DataConfig(batch_size=8), mesh=MeshConfig(data=2, expert=2, tensor=2)
    )
    layout = make_layout(cfg)
    params, _ = transformer.init_model(DENSE, jax.random.key(0))
    one, _ = upcycle.upcycle(params, cfg.model, 0, None)
    many, _ = upcycle.upcycle(params, cfg.model, 0, layout)
    jax.tree.map(np.testing.assert_array_equal, one, many)
    experts = many["moe_blocks"]["moe"]["experts"]["w_up"]
    assert experts.sharding.shard_shape(experts.shape)[1] == 2  # of 4, over expert=2


def test_a_run_begins_where_the_dense_one_ended(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join("abcdefgh"[i % 8] * 40 for i in range(60)))
    data = DataConfig(
        sources=(f"text={text}",),
        tokenizer="byte",
        seq_len=16,
        batch_size=8,
        validation_fraction=0.2,
    )
    few = TrainConfig(steps=3, log_every=1, eval_every=9, eval_batches=1, checkpoint_every=9)
    model = dataclasses.replace(DENSE, vocab_size=0)
    dense = ExperimentConfig(
        model=model,
        data=data,
        train=few,
        mesh=MeshConfig(data=1),
        optimizer=OptimizerConfig(warmup_steps=1, schedule="constant"),
    )
    train(dense, tmp_path / "dense")
    ours = dataclasses.replace(mixture(), vocab_size=0)
    begun = dataclasses.replace(few, init_from=str(tmp_path / "dense"), upcycle=True)
    cfg = dataclasses.replace(dense, model=ours, train=begun)
    train(cfg, tmp_path / "moe")
    last = read_metrics(tmp_path / "dense")["validation"][3]["loss"]
    first = read_metrics(tmp_path / "moe")["validation"][0]["loss"]
    assert first == pytest.approx(last, rel=1e-5)  # the same function, with other roundings
    # It goes on without the base, and only as what it was begun as.
    (tmp_path / "dense").rename(tmp_path / "gone")
    train(dataclasses.replace(cfg, train=dataclasses.replace(begun, steps=4)), tmp_path / "moe")
    with pytest.raises(ConfigError, match=r"train\.upcycle: True there, False now"):
        changed = dataclasses.replace(begun, upcycle=False)
        train(dataclasses.replace(cfg, train=changed), tmp_path / "moe")


@pytest.mark.parametrize(
    ("dense", "cfg", "message"),
    [
        (mixture(), mixture(), "has experts already"),
        (DENSE, DENSE, r"num_experts=0: 8, say would work"),
        (DENSE, {"d_expert": 12}, r"d_expert=12: 24 would work"),
        (DENSE, {"shared_experts": 1}, r"shared_experts=1: 0, and d_shared=0 would work"),
        (DENSE, {"activation": "gelu_tanh"}, r"activation=gelu_tanh: swiglu would work"),
        (DENSE, {"latent_dim": 8}, r"latent_dim=8: 0 would work"),
    ],
)
def test_what_cannot_be_copies_is_refused(dense, cfg, message):
    if isinstance(cfg, dict):
        cfg = mixture(moe=dataclasses.replace(COPIES, **cfg))
    with pytest.raises(ConfigError, match=message):
        upcycle.begun_from(dense, cfg)

"""The plan's FLOPs and memory against XLA's analysis of what is really compiled."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from moejax.config import (
    AttentionConfig,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
)
from moejax.cost import available, hardware, memory, receipt
from moejax.cost.architecture import of_model
from moejax.cost.flops import flops_per_token
from moejax.mesh import MeshSizes
from moejax.models import blocks
from moejax.params import abstract_params, is_spec
from moejax.sharding import make_layout
from moejax.train import verify
from tests.flat import change

MOE = MoEConfig(num_experts=8, experts_per_token=2, d_expert=128, shared_experts=1)
MODEL = ModelConfig(
    vocab_size=512, d_model=128, num_layers=2, d_ff=384,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32), moe=MOE,
)  # fmt: skip
MLA = AttentionConfig(
    kind="mla", num_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32,
    qk_rope_head_dim=16, v_head_dim=32,
)  # fmt: skip


def experiment(changes=(), **kwargs):
    """MODEL with some fields changed, of the model or of how it is computed."""
    cfg = ExperimentConfig(model=MODEL, data=DataConfig(seq_len=64, batch_size=8), **kwargs)
    return change(cfg, **dict(changes))


@pytest.mark.parametrize(
    "changes, phase",
    [
        ({"moe": MoEConfig()}, "forward"),
        ({}, "forward"),
        ({"attention": MLA, "mtp_depth": 1, "num_layers": 1, "num_dense_layers": 0}, "train"),
    ],
    ids=["dense", "moe", "mla and mtp, with gradient"],
)
def test_flops_are_xlas_within_three_percent(changes, phase):
    """XLA counts elementwise work too, which the plan leaves out: 1 to 2% at these widths, less at
    larger ones. So its count is above the plan's, and by less than 3%."""
    cfg = experiment(changes)
    counted = verify.xla_flops(cfg, gradient=phase == "train")
    assert 1 <= counted / verify.predicted_flops(cfg, phase) < 1.03


def analysis(cfg, layout=None):
    return verify._compile(cfg, layout).memory_analysis()


@pytest.mark.parametrize(
    "changes",
    [
        {"moe": MoEConfig(), "d_ff": 600},
        {"moe": MoEConfig(), "activation": "gelu_tanh", "dtype": "bfloat16"},
        {"dtype": "bfloat16"},
        {"attention": MLA},
        {"attention": dataclasses.replace(MODEL.attention, qk_norm="head")},
        {"moe": MoEConfig(), "attention_block": 32},
        {"attention": MLA, "attention_block": 32, "dtype": "bfloat16"},
    ],
    ids=[
        "dense",
        "gelu, bfloat16",
        "moe, bfloat16",
        "mla",
        "qk norm",
        "blocks",
        "mla in blocks, bfloat16",
    ],
)
def test_layers_keep_what_jax_saves(changes):
    """The plan's bytes per token against the arrays that the pullback of one block holds, traced
    without compiling. Two are left out because XLA drops them: masks (the same for every layer)
    and the second of two arrays of scores. 6%: JAX 0.12 keeps that much less for GELU than 0.10,
    and one more array as wide as the FFN would be 7%."""
    run = experiment({"num_layers": 1, "num_dense_layers": 0, **changes})
    cfg, dtype = run.model, run.compute.dtype
    seq_len = 96  # unlike any width, so that shapes tell arrays from weights
    specs = blocks.block_specs(cfg, cfg.num_moe_layers > 0)
    where = blocks.locate(jnp.zeros((1, seq_len), jnp.int32), cfg)
    ctx = blocks.Context(cfg=cfg, compute=run.compute, where=where)

    def saved(params, x_BSD):
        of = lambda p, x: blocks.block(x, blocks.LayerInput(p, 0, 0), ctx)[0]  # noqa: E731
        return jax.vjp(of, params, x_BSD)[1]

    x_BSD = jax.ShapeDtypeStruct((1, seq_len, cfg.d_model), dtype)
    arrays = jax.tree.leaves(jax.eval_shape(saved, abstract_params(specs), x_BSD))
    weights = {s.shape for s in jax.tree.leaves(specs, is_leaf=is_spec)}
    kept = [a for a in arrays if a.shape not in weights and a.dtype != jnp.bool_]
    scores = 0 if run.compute.attention_block else 4 * cfg.attention.num_heads * seq_len
    real = sum(a.size * a.dtype.itemsize for a in kept) / seq_len - scores
    assert memory.layer_bytes(run, seq_len, MeshSizes()) == pytest.approx(real, rel=0.06)


@pytest.mark.parametrize(
    "changes", [{}, {"moe": MoEConfig(), "remat": "full"}], ids=["moe", "dense, remat full"]
)
def test_memory_is_xlas(changes):
    """The state to 1% (it also holds counters, the batch and the balance bias); all of it to 15%,
    the largest error of the estimate on small float32 models (see `moejax.cost.memory`)."""
    # Several layers of a kind: XLA unrolls a loop of one, and then keeps less.
    cfg = experiment({"num_layers": 3, "num_dense_layers": 0, **changes})
    held, xla = memory.training(cfg, MeshSizes(), 8, 64), analysis(cfg)
    assert xla.argument_size_in_bytes == pytest.approx(held.weights + held.optimizer, rel=0.01)
    real = xla.argument_size_in_bytes + xla.temp_size_in_bytes
    assert held.total == pytest.approx(real, rel=0.15)


@pytest.mark.parametrize("seq_len", [512, 1024])
def test_memory_of_long_rows_is_xlas(seq_len):
    """All scores at once, and in blocks, where the plan is 1% and 9% above XLA: gradients of scores that
    it forgets are 14% of the first, scores that there are none of 200% of the second."""
    cfg = experiment({"num_layers": 3, "num_dense_layers": 0, "moe": MoEConfig(), "remat": "full"})
    cfg = change(cfg, seq_len=seq_len, batch_size=2)
    xla = analysis(cfg)
    real = xla.argument_size_in_bytes + xla.temp_size_in_bytes
    assert memory.training(cfg, MeshSizes(), 2, seq_len).total == pytest.approx(real, rel=0.1)


@pytest.mark.slow
@pytest.mark.product
def test_memory_of_a_mesh_is_xlas():
    """The state split over expert and fsdp to 2% (the plan splits norms too, the layout does not);
    all of it, with the buffers of expert parallelism, to 25%: XLA gathers some weights early."""
    changes = {"num_layers": 3, "num_dense_layers": 0}
    cfg = experiment(changes, mesh=MeshConfig(data=1, fsdp=2, expert=4))
    layout = make_layout(cfg, jax.devices()[:8])
    held = memory.training(cfg, MeshSizes(fsdp=2, expert=4), 8, 64)
    xla = analysis(cfg, layout)
    assert xla.argument_size_in_bytes == pytest.approx(held.weights + held.optimizer, rel=0.02)
    real = xla.argument_size_in_bytes + xla.temp_size_in_bytes
    assert held.total == pytest.approx(real, rel=0.25)


@pytest.mark.slow
@pytest.mark.product
def test_verify_reports_every_prediction():
    cfg = experiment(
        {"num_layers": 1, "num_dense_layers": 0},
        train=TrainConfig(accumulation=2),
        mesh=MeshConfig(data=8),
    )
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, batch_size=16))
    flops, memory, measured = verify.verify(cfg, steps=1)
    assert len(flops.rows) == 1 and len(memory.rows) == 3
    assert all(r[3].endswith("%") for r in (*flops.rows, *memory.rows))
    values = {r[0]: r[2] for r in measured.rows}
    assert values["of the matmul peak"].endswith("%")
    assert float(values["tokens/s"].replace(",", "")) > 0


def test_receipt_by_hand():
    """At a peak of the model's own FLOPs per token, one token a second achieves all of it."""
    cfg = experiment({"moe": MoEConfig()})
    f = flops_per_token(of_model(cfg.model), "train", 64).total or 0
    rows = {r[0]: list(r[1:]) for r in receipt.receipt(cfg, 1.0, f, planned=1.2).rows}
    assert rows["tokens/s"] == ["1", "1", "+20.0%"]
    assert rows["seconds a step"] == ["426.7 s", "512 s", "-16.7%"]
    assert rows["of the matmul peak"][1] == "100.0%"


def test_plan_of_a_run():
    """On virtual devices of one CPU: each has its share of cores and memory."""
    cfg = experiment((), mesh=MeshConfig(data=2, expert=4))
    layout = make_layout(cfg, jax.devices()[:8])
    plan = receipt.plan_run(cfg, layout)
    assert plan.setup.mesh == MeshSizes(data=2, expert=4)
    assert plan.setup.device.memory < available.physical_memory() / 4
    first, second = plan.headline().split("\n")
    assert first.startswith("plan: ") and "active" in first and "on 8 x cpu" in second
    assert "error of the plan" in plan.receipt(plan.step.tokens_per_second)
    assert "+0.0%" in plan.receipt(plan.step.tokens_per_second)


def test_device_at_hand_is_found_in_the_table():
    assert getattr(hardware.device_of_kind("NVIDIA H100 80GB HBM3"), "name", "") == "h100"
    assert hardware.device_of_kind("NVIDIA GH200 480GB") is None

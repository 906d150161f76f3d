"""The mesh, the table, errors before compilation, and where arrays really lie."""

import dataclasses
import importlib.machinery
import sys
import types

import chex
import jax
import jax.numpy as jnp
import pytest

from moejax import axes
from moejax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    TrainConfig,
)
from moejax.mesh import RULES, TOGETHER, check_layout, mesh_sizes, parse_rules
from moejax.models import transformer
from moejax.params import path_name
from moejax.routers import router_options
from moejax.sharding import Layout, make_layout, make_mesh
from moejax.train.state import create_state, init_state, state_shardings
from tests.flat import change

MODEL = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    num_dense_layers=1,
    d_ff=16,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4),
    moe=MoEConfig(
        num_experts=8,
        experts_per_token=2,
        d_expert=8,
        shared_experts=1,
        router=router_options(expert_bias=True),
    ),
)
CFG = ExperimentConfig(
    model=MODEL,
    objective=ObjectiveConfig(bias_update="sign"),
    data=DataConfig(seq_len=8, batch_size=8),
)


def with_mesh(
    mesh: dict, changes: dict | None = None, moe: dict | None = None, **model
) -> ExperimentConfig:
    model_cfg = dataclasses.replace(
        MODEL, moe=dataclasses.replace(MODEL.moe, **(moe or {})), **model
    )
    mesh_cfg = dataclasses.replace(MeshConfig(data=1), **mesh)
    return change(dataclasses.replace(CFG, model=model_cfg, mesh=mesh_cfg), **(changes or {}))


def layout_for(mesh: dict, **changes) -> Layout:
    layout = make_layout(with_mesh(mesh, changes))
    assert layout is not None
    return layout


# ---------------------------------------------------------------------------------------------------
# Mesh and table.


def test_free_axis_takes_what_is_left():
    mesh = make_mesh(MeshConfig(data=-1, expert=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2}
    assert make_mesh(MeshConfig(data=1), jax.devices()[:1]).size == 1


def test_one_device_has_no_layout():
    assert make_layout(with_mesh({})) is None


def test_rules_replace_rows():
    rules = parse_rules(("expert=data", "vocab=", "mlp=fsdp+tensor"))
    assert rules[axes.EXPERT] == ("data",)
    assert rules[axes.VOCAB] == ()
    assert rules[axes.MLP] == ("fsdp", "tensor")
    untouched = set(RULES) - {axes.EXPERT, axes.VOCAB, axes.MLP}
    assert all(rules[name] == RULES[name] for name in untouched)


@pytest.mark.parametrize(
    ("row", "names"),
    [("experts=data", "'experts=data'.*expert_mlp"), ("expert=dta", "'expert=dta'.*'dta'.*data")],
)
def test_bad_rule(row, names):
    with pytest.raises(ConfigError, match=names):
        parse_rules((row,))


def test_every_parameters_axes_are_checked_together():
    """TOGETHER lists, by hand, which axes meet; a new kind of parameter must be covered by it."""
    mla = dataclasses.replace(
        MODEL,
        mtp_depth=1,
        positions="rope",
        attention=AttentionConfig(
            kind="mla", q_lora_rank=4, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=4
        ),
    )
    for model in (MODEL, mla, dataclasses.replace(MODEL, positions="learned")):
        specs = jax.tree_util.tree_leaves_with_path(
            transformer.param_specs(model), is_leaf=lambda x: hasattr(x, "axes")
        )
        for path, spec in specs:
            names = {a for a in spec.axes if a not in (None, axes.LAYERS)}
            assert any(names <= set(group) for group in TOGETHER), path_name(path)


# ---------------------------------------------------------------------------------------------------
# Bad input: what is wrong, both numbers, and what would work, before anything is compiled.


def test_two_dimensions_on_one_mesh_axis():
    with pytest.raises(ConfigError, match=r"'expert' and 'expert_embed'.*mesh axis 'fsdp'"):
        make_layout(with_mesh(dict(fsdp=2, rules=("expert=fsdp",))))


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        (dict(data=4, expert=4), r"data=4, .*expert=4.* needs 16 devices, there are 8.*4 or 8"),
        (dict(data=-1, expert=3), r"expert=3.* multiple of 3 devices, there are 8"),
    ],
)
def test_mesh_larger_than_the_devices(mesh, text):
    with pytest.raises(ConfigError, match=text):
        make_layout(with_mesh(mesh))


@pytest.mark.parametrize(
    ("mesh", "model", "text"),
    [
        (
            dict(expert=4),
            dict(moe=dict(num_experts=6)),
            "num_experts=6 .*4 devices.*expert=4.*3 or",
        ),
        (dict(tensor=4), {}, "num_kv_heads=2 .*4 devices .*tensor=4.*may be 1 or 2"),
        (dict(tensor=2), dict(vocab_size=33), "vocab_size=33 .*2 devices .*tensor=2"),
        (dict(fsdp=8), dict(d_model=20), "d_model=20 .*8 devices .*fsdp=8.*5, 10 or 20"),
        (dict(tensor=2), dict(moe=dict(d_expert=7)), "d_expert=7 .*2 devices .*tensor=2"),
        (dict(tensor=2), dict(d_ff=15), "d_ff=15 .*2 devices .*tensor=2"),
        (
            dict(tensor=2, rules=("latent=tensor", "heads=")),
            dict(attention=AttentionConfig(kind="mla", kv_lora_rank=6, qk_rope_head_dim=1)),
            "kv_lora_rank .* qk_rope_head_dim=7 .*2 devices .*tensor=2",
        ),
    ],
)
def test_sizes_that_do_not_divide(mesh, model, text):
    with pytest.raises(ConfigError, match=text):
        make_layout(with_mesh(mesh, **model))


def test_batch_that_does_not_divide():
    cfg = dataclasses.replace(with_mesh(dict(data=8)), train=TrainConfig(accumulation=2))
    with pytest.raises(ConfigError, match=r"batch_size / train.accumulation=4 .*8 devices.*data=8"):
        make_layout(cfg)


def test_all_to_all_without_batch_on_the_expert_axis():
    cfg = with_mesh(
        dict(data=2, expert=4, rules=("batch=data",)), dict(expert_parallel="all_to_all")
    )
    with pytest.raises(
        ConfigError, match=r"'expert' of size 4.*'ring' would work.*batch=data\+expert"
    ):
        make_layout(cfg)
    assert layout_for(dict(data=2, expert=4, rules=("batch=data",))).size(axes.EXPERT) == 4


def test_kernels_that_the_platform_lacks():
    with pytest.raises(ConfigError, match=r"grouped_matmul='tokamax'.*'cpu'.*'auto' would work"):
        make_layout(with_mesh(dict(expert=2), dict(grouped_matmul="tokamax")))


def test_kernels_whose_package_is_missing(monkeypatch):
    """Before anything is compiled, where they would run."""
    cfg = with_mesh({}, dict(grouped_matmul="tokamax"))
    mesh = mesh_sizes(cfg.mesh, 1)
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(
        ConfigError, match=r"needs the package tokamax: pip install 'moejax\[kernels"
    ):
        check_layout(cfg, mesh, "gpu")
    tokamax = types.ModuleType("tokamax")
    tokamax.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    monkeypatch.setitem(sys.modules, "tokamax", tokamax)
    check_layout(cfg, mesh, "gpu")
    with pytest.raises(ConfigError, match=r"works on one GPU only.*'auto' would work"):
        two = with_mesh(dict(data=2), dict(grouped_matmul="tokamax"))
        check_layout(two, mesh_sizes(two.mesh, 2), "gpu")


# ---------------------------------------------------------------------------------------------------
# Where arrays lie.


def test_constrain_leaves_whole_what_does_not_divide():
    layout = layout_for(dict(data=2, fsdp=2, tensor=2))
    f = jax.jit(lambda x: layout.constrain(x, axes.BATCH, None))
    assert f(jnp.zeros((8, 3))).addressable_shards[0].data.shape == (2, 3)
    assert f(jnp.zeros((2, 3))).addressable_shards[0].data.shape == (1, 3)
    assert f(jnp.zeros((3, 3))).addressable_shards[0].data.shape == (3, 3)


def test_state_is_created_sharded():
    """Parameters, moments and router state: the shards that each device holds, by size."""
    cfg = with_mesh(dict(fsdp=2, expert=2, tensor=2))
    layout = make_layout(cfg)
    state = create_state(cfg, jax.random.key(0), layout)
    # [layers, E, D, F] over expert, fsdp and tensor; [V, D] over tensor and fsdp; and so on.
    shards = {
        "moe_blocks/moe/experts/w_up": (1, 4, 8, 4),
        "moe_blocks/moe/experts/w_down": (1, 4, 4, 8),
        "moe_blocks/moe/router/kernel": (1, 8, 8),
        "moe_blocks/moe/shared/w_up": (1, 8, 4),
        "moe_blocks/attn/w_q": (1, 8, 8),
        "moe_blocks/attn/w_o": (1, 8, 8),
        "dense_blocks/ffn/w_down": (1, 8, 8),
        "embed/tokens": (16, 8),
        "head": (8, 16),
        "final_norm/scale": (8,),
    }

    def shard_shapes(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {path_name(p): {s.data.shape for s in a.addressable_shards} for p, a in leaves}

    got = shard_shapes(state.params)
    assert {name: got[name] for name in shards} == {n: {s} for n, s in shards.items()}
    moments = shard_shapes(state.opt_state)
    for name, shape in shards.items():
        of_name = [s for path, s in moments.items() if path.endswith(name)]
        assert of_name == [{shape}, {shape}], name  # Adam's two
    bias = state.router_state["moe_blocks"]["expert_bias"]
    assert bias.sharding.is_fully_replicated and len(bias.sharding.device_set) == 8

    want = state_shardings(cfg, layout)
    same = jax.tree.map(lambda a, s: a.sharding.is_equivalent_to(s, a.ndim), state, want)
    assert all(jax.tree.leaves(same))


def test_no_device_holds_a_whole_copy_while_the_state_is_created():
    """What each device needs, temporaries included, by the compiled program's own account."""
    cfg = with_mesh(dict(fsdp=8), d_model=512, num_layers=2)
    layout = make_layout(cfg)

    make = jax.jit(lambda k: init_state(cfg, k), out_shardings=state_shardings(cfg, layout))
    memory = make.lower(jax.random.key(0)).compile().memory_analysis()
    whole = sum(
        a.size * a.dtype.itemsize
        for a in jax.tree.leaves(jax.eval_shape(lambda: init_state(cfg, jax.random.key(0))))
    )
    assert memory.output_size_in_bytes < 1.1 * whole / 8
    assert memory.temp_size_in_bytes < whole / 8


def test_initial_values_do_not_depend_on_the_mesh():
    cfg = with_mesh(dict(fsdp=2, expert=2, tensor=2))
    meshed = create_state(cfg, jax.random.key(0), make_layout(cfg))
    single = create_state(cfg, jax.random.key(0), None)
    chex.assert_trees_all_equal(jax.device_get(meshed), jax.device_get(single))

"""DeepSeek-V4 on a mesh: streams are never split, heads of queries and of the indexer and groups of outputs
are, and a step is the step of one device."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from mesh_case import assert_same, config, layout_of, oracle, run

from moejax.config import ConfigError
from moejax.models import hyper_connections as hc
from moejax.models import transformer
from moejax.models.blocks import constrain
from moejax.params import by_path

MESH = dict(data=2, fsdp=2, tensor=2)
V4 = dict(
    router="deepseek_v4_hash", hash_layers=1, count=2, mtp=1, kind="compressed", layer_kinds=("csa", "hca"),
    sliding_window=2, csa_rate=1, hca_rate=2, q_lora_rank=6, qk_rope_head_dim=2, interleaved=True,
    o_groups=2, o_lora_rank=3, index_heads=16, index_head_dim=4, index_topk=2, index_loss=0.5,
)  # fmt: skip


def test_streams_and_their_weights_stay_whole():
    cfg = config(mesh={**MESH, "rules": ("act_embed=tensor",)}, count=2)
    layout = layout_of(cfg)
    assert layout is not None
    x = jax.jit(lambda x: constrain(x, layout))(jnp.zeros((16, 4, 2, 8)))
    assert x.sharding.spec == PartitionSpec(("data", "fsdp"), None, None, "tensor")
    for spec in by_path(hc.sub_layer_specs(cfg.model)).values():
        assert not any(layout.spec(*spec.axes))


def test_heads_are_split():
    """Of queries, of the indexer, and of outputs by groups; compressors lie whole on each device of the
    tensor axis."""
    cfg = config(mesh=MESH, **V4)
    layout = layout_of(cfg)
    assert layout is not None
    specs = by_path(transformer.param_specs(cfg.model))
    split = {path: layout.spec(*s.axes) for path, s in specs.items() if "attn/" in path}
    heads = [path for path, spec in split.items() if "tensor" in spec]
    assert {path.removeprefix("moe_blocks/attn/") for path in heads if "mtp" not in path} == {
        *("w_q_b", "sinks", "w_o_a", "w_o_b"),
        *("csa_attn/indexer/w_q", "csa_attn/indexer/w_heads"),
    }
    wrong = {**V4, "o_groups": 1, "index_heads": 15}
    with pytest.raises(ConfigError) as e:
        layout_of(config(mesh=MESH, **wrong))
    assert "attention.o_groups=1 does not divide" in str(e.value)
    assert "attention.index_heads=15 does not divide" in str(e.value)


@pytest.mark.product
@pytest.mark.parametrize(
    "how",
    [
        dict(mesh=MESH),
        dict(mesh=dict(data=2, expert=4), expert_parallel="all_to_all", scan=False),
        dict(accumulation=4, remat="dots", attention_block=2),
    ],
    ids=["all axes", "experts", "one device, in blocks"],
)
def test_a_step(how):
    assert_same(run(**how, **V4), the_oracle())


@functools.cache
def the_oracle():
    return oracle(**V4)

"""Attention in blocks on a mesh: the step of one device, and nothing as large as scores travels."""

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from mesh_case import QUICK, assert_same, config, layout_of, oracle, run

from moejax.attention.block_attention import Sight, attend_in_blocks

MESH = dict(data=2, fsdp=2, tensor=2)
CFG = dict(sinks=True, windows=(3, 0))


@pytest.mark.product
def test_a_step_in_blocks():
    """Rows of four tokens in blocks of two: rematerialised, in two micro-batches."""
    assert_same(
        run(mesh=MESH, attention_block=2, remat="full", accumulation=2, **CFG), oracle(**CFG)
    )


def test_only_the_table_of_blocks_travels():
    """Batch and heads stay split in the loops over blocks. The devices agree on which blocks some row needs,
    and add up the gradient of the sinks."""
    mesh = layout_of(config(mesh=MESH)).mesh
    split = lambda *axes: jax.sharding.NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    rows = ("data", "fsdp")

    def loss(q, k, v, sinks, positions, documents):
        sight = Sight(positions, positions, documents, documents, 3)
        return attend_in_blocks(q, k, v, sight, 0.5, sinks, block=8).sum()

    shapes = {
        (8, 32, 4, 4): split(rows, None, "tensor"),
        (8, 2, 32, 4): split(rows, "tensor"),
        (8, 2, 32, 3): split(rows, "tensor"),
        (4,): split("tensor"),
    }
    args = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=at) for s, at in shapes.items()]
    args += [jax.ShapeDtypeStruct((8, 32), jnp.int32, sharding=split(rows))] * 2
    grad = jax.jit(
        jax.value_and_grad(loss, (0, 1, 2, 3)),
        out_shardings=(split(), tuple(shapes.values())),
        compiler_options=QUICK,
    )
    text = grad.lower(*args).compile().as_text()
    moved = re.findall(r"= \(?(\w+)\[([\d,]*)\].* (?:all-|reduce-scatter|collective-permute)", text)
    sizes = [math.prod(int(n) for n in shape.split(",") if n) for _, shape in moved]
    assert "pred" in [kind for kind, _ in moved] and max(sizes) <= 4 * 4

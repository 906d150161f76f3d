"""Several residual streams on a mesh: never split themselves, and a step is the step of one device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from mesh_case import assert_same, config, layout_of, oracle, run

from moejax.models import hyper_connections as hc
from moejax.models.blocks import constrain
from moejax.params import by_path

MESH = dict(data=2, fsdp=2, tensor=2)
STREAMS = dict(count=2, mtp=1)


def test_streams_and_their_weights_stay_whole():
    cfg = config(mesh={**MESH, "rules": ("act_embed=tensor",)}, count=2)
    layout = layout_of(cfg)
    assert layout is not None
    x = jax.jit(lambda x: constrain(x, layout))(jnp.zeros((16, 4, 2, 8)))
    assert x.sharding.spec == PartitionSpec(("data", "fsdp"), None, None, "tensor")
    for spec in by_path(hc.sub_layer_specs(cfg.model)).values():
        assert not any(layout.spec(*spec.axes))


@pytest.mark.product
def test_a_step():
    assert_same(run(mesh=MESH, remat="full", accumulation=2, **STREAMS), oracle(**STREAMS))

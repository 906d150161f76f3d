"""On any mesh and in any way of computing it, one step is the step of the dense oracle on one device.

Loss, cross-entropy, every balance loss, every gradient, every load and the router's new bias. The cases
of CORE each combine several ways; PRODUCT (`pytest -m product`) is the rest of the table.
"""

import functools

import jax
import numpy as np
import pytest
from mesh_case import ALL_SLOTS, QUICK, assert_same, config, layout_of, make_inputs, oracle, run

from moejax.train.state import state_of_model, state_shardings
from moejax.train.step import train_step

EXPERTS_ON_DATA = ("expert=data",)
ALL = dict(fsdp=2, expert=2, tensor=2)

the_oracle = functools.cache(oracle)

CORE: dict[str, dict] = {
    "data": dict(mesh=dict(data=8)),
    "ring": dict(mesh=dict(data=2, expert=4), skewed=True, remat="full"),
    "all_to_all": dict(
        mesh=dict(data=2, expert=4), expert_parallel="all_to_all", skewed=True, scan=False
    ),
    "ring on all axes": dict(mesh=ALL, accumulation=2, remat="full"),
    "all_to_all on all axes": dict(mesh=ALL, expert_parallel="all_to_all", mtp=1),
    "experts on the batch's axis": dict(
        mesh=dict(data=4, rules=EXPERTS_ON_DATA), expert_parallel="all_to_all", accumulation=2
    ),
    "capacity": dict(
        mesh=dict(data=2, fsdp=2, tensor=2), capacity_factor=ALL_SLOTS, accumulation=4
    ),
}
DEAR = (
    "data",
    "all_to_all on all axes",
    "experts on the batch's axis",
)  # these in `pytest -m product`


def check(skewed=False, mtp=0, **how):
    want = the_oracle(skewed=skewed, mtp=mtp)
    got = run(skewed=skewed, mtp=mtp, **how)
    assert set(got["balance"]) == {"expert", "sequence", "device", "communication", "z"}
    assert all(np.all(s["dropped"] == 0) and "group_load" in s for s in got["stats"].values())
    assert_same(got, want)
    if skewed:  # one device of the expert axis owns every busy expert, the others none
        for load_LE in (stats["load"] for stats in got["stats"].values()):
            assert (load_LE[:, 2:] == 0).all() and (load_LE[:, :2] > 0).all()


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.product) if n in DEAR else n for n in CORE]
)
def test_core(name):
    check(**CORE[name])


def test_float32():
    """The dtype of training, against float64: a sum of some hundred terms of order 1 is rounded by about
    1e-6, on a mesh as on one device."""
    assert_same(run(dtype="float32", mesh=ALL), the_oracle(), dict(rtol=1e-5, atol=1e-6))


def two_steps(**how):
    """Parameters, optimiser and router state after two steps of `train_step`, and metrics. With fewer
    kinds of parameters: each is one more update to compile."""
    cfg = config(moe_ffn_bias=False, router_bias=False, shared_experts=0, **how)
    with jax.enable_x64(True):
        layout = layout_of(cfg)
        params, router_state, batch = make_inputs(cfg, False)
        state = state_of_model(cfg, params, router_state, layout)
        one = functools.partial(train_step, cfg=cfg, layout=layout)
        step = jax.jit(
            one, out_shardings=(state_shardings(cfg, layout), None), compiler_options=QUICK
        )
        for _ in range(2):
            state, metrics = step(state, batch)
        return jax.device_get((state, metrics))


@pytest.mark.product
def test_two_steps():
    got = two_steps(mesh=ALL, expert_parallel="all_to_all")
    want = two_steps(dispatcher="dense")
    # Adam divides gradients by their size + 1e-8: errors of 1e-16 grow to 1e-8 of the learning rate.
    assert_same(got, want, dict(rtol=1e-8, atol=1e-9))
    assert int(want[0].skipped) == 0 and float(want[1]["drop_fraction"]) == 0


# ---------------------------------------------------------------------------------------------------
# The rest of the table.

MESHES: dict[str, dict] = {
    "data": dict(data=4),
    "fsdp": dict(fsdp=4),
    "expert": dict(expert=4),
    "tensor": dict(tensor=2),
    "data*expert": dict(data=2, expert=2),
    "data*fsdp*expert": dict(data=2, fsdp=2, expert=2),
    "expert*tensor": dict(expert=4, tensor=2),
    "experts on data": dict(data=4, tensor=2, rules=EXPERTS_ON_DATA),
    "experts apart": dict(data=2, expert=2, rules=("batch=data",)),
}
WAYS: dict[str, dict] = {
    "dense": dict(dispatcher="dense"),
    "capacity": dict(capacity_factor=ALL_SLOTS, accumulation=2, remat="full"),
    "ring": dict(skewed=True, accumulation=2, scan=False),
    "ring, MTP": dict(mtp=1, remat="full"),
    "all_to_all": dict(expert_parallel="all_to_all", skewed=True, remat="full"),
    "all_to_all, MTP": dict(expert_parallel="all_to_all", mtp=1, accumulation=2),
}
# Without an expert axis the strategies are one program; with experts apart from the batch only ring is. What
# MTP adds and what the dense dispatcher does on a mesh depends on whether there are several axes, not on which:
# one mesh each. Slots are a matter of each device alone where neither experts nor widths are split.
ALONE = ("data", "fsdp", "tensor", "experts apart")
ONCE = {
    "dense": "expert*tensor",
    "ring, MTP": "experts on data",
    "all_to_all, MTP": "data*fsdp*expert",
}
PRODUCT = [
    (mesh, way)
    for mesh in MESHES
    for way in WAYS
    if ("all_to_all" not in way or mesh not in ALONE)
    and (way != "capacity" or mesh not in ("data", "fsdp"))
    and ONCE.get(way, mesh) == mesh
]


@pytest.mark.product
@pytest.mark.parametrize(("mesh", "way"), PRODUCT)
def test_product(mesh, way):
    check(mesh=MESHES[mesh], **WAYS[way])

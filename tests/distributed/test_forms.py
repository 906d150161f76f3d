"""A step of every router that fills, mixes, merges or assigns, and of LatentMoE, on a mesh: that of one device.

What is not routes of tokens the compiler lays out; routers that look at the batch see all of it. QUICK runs
with the others of this folder, the rest in `pytest -m product`."""

import pytest
from mesh_case import assert_same, run

ALL = dict(fsdp=2, expert=2, tensor=2)
# mesh_case's options and losses that other routers do not have.
NONE = dict(
    bias_update="none", expert_loss=0.0, sequence_loss=0.0, device_loss=0.0, communication_loss=0.0
)  # fmt: skip
CASES: dict[str, dict] = {
    "soft_moe": dict(router="soft_moe", slots_per_expert=2, z_loss=0.0),
    "lory": dict(router="lory", segment=2, z_loss=0.0),
    "smear": dict(router="smear", z_loss=0.0),
    "expert_choice": dict(router="expert_choice"),
    "base": dict(router="base", experts_per_token=1),
    "sinkhorn": dict(router="sinkhorn"),
    "token_rounding": dict(router="token_rounding", tile=4),
    "peer": dict(router="peer", num_experts=16, heads=1, key_dim=4, z_loss=0.0),
}
QUICK = ("lory",)
# Equal tokens would compete for places, and a rounding of 1e-16 say who wins: here no token comes twice.
TIES = {name: dict(distinct=True, vocab_size=66) for name in ("base", "token_rounding")}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.product) for n in CASES]
)
def test_step_of_a_router(name):
    how = NONE | CASES[name] | TIES.get(name, {})
    got = run(mesh=ALL, **how)
    assert all((s["load"] >= 0).all() and s["load"].sum() > 0 for s in got["stats"].values())
    assert_same(got, run(**how))


@pytest.mark.product
@pytest.mark.parametrize("expert_parallel", ["ring", "all_to_all"])
def test_step_of_latent_experts(expert_parallel):
    """The latent travels between devices; against every expert computing every token on one."""
    got = run(mesh=ALL, latent_dim=4, expert_parallel=expert_parallel)
    assert_same(got, run(latent_dim=4, dispatcher="dense", scan=False))

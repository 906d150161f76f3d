"""Token-choice routers against the routers of `transformers`: the same experts, weights and gradients.

Both get the same float32 numbers; products have 16 terms of order 1, so 2e-6 of the largest weight is a few
roundings, and a gradient, a sum over 24 tokens, is compared at 1e-5.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.dbrx.modeling_dbrx import DbrxFFN
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter
from transformers.models.ernie4_5_moe.modeling_ernie4_5_moe import Ernie4_5_MoeTopKRouter
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRouter
from transformers.models.inkling.modeling_inkling import InklingTopkRouter
from transformers.models.jetmoe.modeling_jetmoe import JetMoeTopKGating
from transformers.models.kolibri1.modeling_kolibri1 import Kolibri1TopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.mistral4.modeling_mistral4 import Mistral4TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router
from transformers.models.phimoe.modeling_phimoe import PhimoeMultiplier, PhimoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

from moejax.moe.dispatch.dense import combine_matrix
from moejax.routers import ROUTERS, router_options
from moejax.routers.contract import RouterConfig, tokens_of

E, D, T, K = 8, 16, 24, 3
GROUPS = {"n_group": 4, "topk_group": 2}
OUR_GROUPS = dict(num_groups=4, topk_groups=2)
SIZES = {"hidden_size": D, "num_experts_per_tok": K}


@dataclasses.dataclass(frozen=True)
class Case:
    """Attributes:
    name: in ROUTERS.
    module: a class of transformers, given the config.
    config: what the config says, as attributes.
    weight: name of the module's matrix.
    options: of ours.
    k: experts per token.
    others: our parameter -> the module's.
    """

    name: str
    module: type
    config: dict
    weight: str = "weight"
    options: dict = dataclasses.field(default_factory=dict)
    k: int = K
    others: dict = dataclasses.field(default_factory=dict)


class Config:
    """Attributes as given; whatever else a router asks for is an error."""

    def __init__(self, **values):
        self.__dict__.update(values)


V2 = dict(num_experts=E, routed_scaling_factor=16.0, topk_method="group_limited_greedy", **GROUPS)
V3 = dict(num_local_experts=E, routed_scaling_factor=2.5, norm_topk_prob=True, **GROUPS)
SWITCH = dict(
    num_experts=E, expert_capacity=T, router_bias=False, router_jitter_noise=0.1,
    router_ignore_padding_tokens=False, router_dtype="float32", hidden_size=D,
)  # fmt: skip
NLLB = dict(
    SWITCH, second_expert_policy="all", normalize_router_prob_before_dropping=True,
    batch_prioritized_routing=False, moe_eval_capacity_token_fraction=1.0,
)  # fmt: skip
INKLING = dict(n_routed_experts=E, n_shared_experts=2, route_scale=8.0)
CASES = [
    Case("deepseek_v2", DeepseekV2TopkRouter, V2, options=OUR_GROUPS),
    Case("deepseek_v3", DeepseekV3TopkRouter, V3, options=OUR_GROUPS),
    Case("deepseek_v4", DeepseekV4TopKRouter,
         dict(num_local_experts=E, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5)),
    Case("mixtral", MixtralTopKRouter, dict(num_local_experts=E)),
    Case("mistral4", Mistral4TopkRouter, {**V3, "routed_scaling_factor": 1.0}, options=OUR_GROUPS),
    Case("ernie", Ernie4_5_MoeTopKRouter, dict(num_experts=E, moe_norm_min=1e-12)),
    Case("kolibri", Kolibri1TopKRouter, dict(num_experts=E, norm_topk_prob=False)),
    Case("llama4", Llama4Router, dict(num_local_experts=E)),
    Case("inkling", InklingTopkRouter, INKLING, others={"scale": "global_scale"}),
    Case("gemma4", Gemma4TextRouter, dict(num_experts=E, rms_norm_eps=1e-6, top_k_experts=K),
         weight="proj.weight",
         others={"input_scale": "scale", "expert_scale": "per_expert_scale"}),
    Case("switch", SwitchTransformersTop1Router, SWITCH, weight="classifier.weight", k=1),
    Case("gshard", NllbMoeTop2Router, NLLB, weight="classifier.weight", k=2),
    Case("sparse_mixer", PhimoeTopKRouter,
         dict(num_local_experts=E, num_experts_per_tok=2, router_jitter_noise=0.4,
              input_jitter_noise=0.0), options=dict(jitter=0.4), k=2),
]  # fmt: skip


def weights_of(name: str, out, module, x) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights on all experts, and on shared ones."""
    if name == "llama4":
        return out[0], None
    if name == "switch":
        return out[0][0] * out[1][0], None
    if name == "gshard":
        return out[1], None
    weights, index = out[1], out[2]
    full = torch.zeros(T, E).scatter(1, index, weights)
    return full, out[3] if name == "inkling" else None


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_router(case, record):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    module = case.module(Config(**{**SIZES, **case.config})).eval()
    rows = E + (2 if case.name == "inkling" else 0)
    parameters = dict(module.named_parameters())
    bias_E = rng.normal(size=E).astype(np.float32) * 0.3
    with torch.no_grad():
        for p in parameters.values():
            p.copy_(torch.tensor(rng.normal(size=p.shape) * (0.5 if p.ndim == 2 else 1.0)))
    bias = [a for n, a in (*module.named_buffers(), *parameters.items()) if "correction_bias" in n]
    for a in bias:
        a.data.copy_(torch.tensor(bias_E).reshape(a.shape))
    x_TD = rng.normal(size=(T, D)).astype(np.float32)
    target_TE = rng.normal(size=(T, E)).astype(np.float32)
    target_TS = rng.normal(size=(T, 2)).astype(np.float32)

    x = torch.tensor(x_TD, requires_grad=True)
    out = module(x[None] if case.name == "switch" else x * 1.0)
    full, shared = weights_of(case.name, out, module, x)
    value = (full * torch.tensor(target_TE)).sum()
    if shared is not None:
        value = value + (shared * torch.tensor(target_TS)).sum()
    value.backward()

    cfg = RouterConfig(
        router_options(case.name, **case.options), E, case.k, D, 32, shared_experts=rows - E
    )
    names = {"kernel": case.weight, **case.others}
    params = {o: jnp.asarray(parameters[t].detach().numpy()) for o, t in names.items()}
    params["kernel"] = params["kernel"].T
    router = ROUTERS[case.name]
    state = {"expert_bias": jnp.asarray(bias_E)} if router.init_state(cfg, 0) else {}
    assert bool(state) == bool(bias)

    def ours(params, x_TD):
        out = router.route(params, state, tokens_of(x_TD, T), cfg)
        full_TE = combine_matrix(out.routing, T, E)
        value = (full_TE * target_TE).sum()
        if out.shared_TS is not None:
            value = value + (out.shared_TS * target_TS).sum()
        return value, (full_TE, out)

    (_, (full_TE, routed)), (dparams, dx_TD) = jax.value_and_grad(ours, (0, 1), has_aux=True)(
        params, jnp.asarray(x_TD)
    )
    want_TE = full.detach().numpy()
    assert ((want_TE > 0) == (np.asarray(full_TE) > 0)).all()
    assert len({tuple(row) for row in want_TE > 0}) > 3  # tokens differ in their experts
    if (
        case.name == "sparse_mixer"
    ):  # else one expert alone could be chosen, and none has a gradient
        assert (want_TE.max(axis=1) < 1).sum() > 3
    scale = want_TE.max()
    np.testing.assert_allclose(full_TE, want_TE, atol=2e-6 * scale, rtol=0)
    if shared is not None:
        np.testing.assert_allclose(routed.shared_TS, shared.detach().numpy(), atol=2e-6 * scale)
    dparams["kernel"] = dparams["kernel"].T
    for ours_name, theirs_name in names.items():
        want = parameters[theirs_name].grad.numpy()
        np.testing.assert_allclose(dparams[ours_name], want, atol=1e-5 * abs(want).max(), rtol=1e-4)
    np.testing.assert_allclose(dx_TD, x.grad.numpy(), atol=1e-5 * abs(x.grad).max(), rtol=1e-4)
    record(case.name, "router", abs(np.asarray(full_TE) - want_TE).max())


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_dbrx(power):
    """Weights alone: the module's function takes logits."""
    rng = np.random.default_rng(0)
    x_TD = rng.normal(size=(T, E)).astype(np.float32)
    theirs = Config(moe_normalize_expert_weights=power, top_k=K)
    weights, index = DbrxFFN.route_tokens_to_experts(theirs, torch.tensor(x_TD))
    cfg = RouterConfig(router_options("dbrx", norm_power=power), E, K, E, 32)
    routing = ROUTERS["dbrx"].route(
        {"kernel": jnp.eye(E)}, {}, tokens_of(jnp.asarray(x_TD), T), cfg
    )
    np.testing.assert_array_equal(routing.routing.expert_index_TK, index.numpy())
    np.testing.assert_allclose(routing.routing.combine_weights_TK, weights.numpy(), rtol=2e-6)


def test_jetmoe_computes_as_mixtral():
    rng = np.random.default_rng(0)
    x_TD = rng.normal(size=(T, D)).astype(np.float32)
    gating = JetMoeTopKGating(D, E, K)
    order, _, gates, _, _ = gating(torch.tensor(x_TD))
    theirs = np.zeros(T * K, np.float32)
    theirs[order.numpy()] = gates.detach().numpy()
    kernel = jnp.asarray(gating.layer.weight.detach().numpy().T)
    cfg = RouterConfig(router_options("mixtral"), E, K, D, 32)
    out = ROUTERS["mixtral"].route({"kernel": kernel}, {}, tokens_of(jnp.asarray(x_TD), T), cfg)
    np.testing.assert_allclose(out.routing.combine_weights_TK, theirs.reshape(T, K), rtol=5e-6)


def test_sparse_mixers_gradient_is_that_of_the_weight():
    """The module multiplies a weight by 1 or 1/3 and gives the gradient of the weight itself, as ours does."""
    scores = torch.tensor([[0.3, 0.2, -0.1]], requires_grad=True)
    gates, chosen = torch.softmax(scores.detach(), -1), torch.tensor([[1]])
    p = gates.gather(1, chosen)
    out = PhimoeMultiplier.apply(scores, p, chosen, gates, torch.tensor([[1 / 3]]))
    assert out.item() == pytest.approx(p.item() / 3)
    out.backward(torch.ones(1, 1))
    want = jax.grad(lambda z: jax.nn.softmax(z)[1])(jnp.array([0.3, 0.2, -0.1]))
    np.testing.assert_allclose(scores.grad[0], want, rtol=1e-6)

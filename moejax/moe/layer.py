"""The Mixture-of-Experts layer: route -> dispatch -> experts -> combine, plus the shared experts.

DeepSeekMoE (2401.06066) eq. 9: y = shared(x) + sum_k w_k E_k(x); the residual is the block's. LatentMoE
(2601.18089), with moe.latent_dim: y = shared(x) + W_up sum_k w_k E_k(W_down x). Special experts see x.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import ComputeConfig, ModelConfig, ObjectiveConfig
from moejax.linear import linear
from moejax.moe.dispatch import dispatch
from moejax.moe.experts import expert_param_specs, ffn, ffn_param_specs, of_experts
from moejax.params import ParamSpec, router_specs
from moejax.routers import router_of, specials
from moejax.routers.contract import (
    BatchTotals,
    Routed,
    Router,
    RouterConfig,
    Routing,
    Tokens,
    tokens_of,
)
from moejax.sharding import Layout

# Reserved names in a layer's router state, taken out before the router sees it. They are put there to look at a
# model that has fewer experts (`moejax.evals.intervene`) or is told its routes (`moejax.evals.trace_replay`);
# nothing trains or saves them.
BARRED = "barred"  # bool, E: no token may choose these experts
SKIPPED = (
    "skipped"  # int32: each token may not choose this many experts, those that it scores highest
)
TOLD = "told"  # int32, N by K: the experts of the token at each position; `block` reads it


class MoEAux(NamedTuple):
    """What one layer reports. Unused fields cost nothing under jit.

    Attributes:
      losses: balance losses by name, coefficients applied.
      stats: the router's `Routed.stats`, and `dropped`: routes that found no slot, `stray`: routes to an expert
        that does not exist. Sums over tokens.
      routing: the router's routing, over T = B*S tokens.
      scores_TE: its scores, or None.
      choice_TN, logits_TE: as in `Routed`, or None.
      carry_BSW: what it passes to the next layer's router, or None; `block` takes it out.
      inputs_BSD: what the layer read, normalised; `block` puts it here where someone wants to look at it.
    """

    losses: dict[str, jax.Array]
    stats: dict[str, jax.Array]
    routing: Any
    scores_TE: jax.Array | None
    carry_BSW: jax.Array | None = None
    inputs_BSD: jax.Array | None = None
    choice_TN: jax.Array | None = None
    logits_TE: jax.Array | None = None


def param_specs(cfg: ModelConfig) -> dict:
    moe, d, std = cfg.moe, cfg.d_model, cfg.init_std
    router, sizes = router_of(moe.router), cfg.router_config()
    specs: dict = {"experts": expert_param_specs(moe, moe.expert_input(d), std)}
    if moe.latent_dim:
        # Split over the model width alone, like the router's matrix: a device holds whole latents.
        specs["latent_down"] = ParamSpec((d, moe.latent_dim), (axes.EMBED, axes.LATENT), std=std)
        specs["latent_up"] = ParamSpec((moe.latent_dim, d), (axes.LATENT, axes.EMBED), std=std)
    learned = router_specs(router.param_specs(sizes))
    if learned:  # a hash has nothing to learn, and a tree of parameters no empty branch
        specs["router"] = learned
    special = specials.param_specs(router.specials(sizes), d, std)
    if special:
        specs["specials"] = special
    if moe.shared_width:
        specs["shared"] = ffn_param_specs(d, moe.shared_width, moe.activation, moe.ffn_bias, std)
        if moe.shared_gate:
            specs["shared_gate"] = ParamSpec((d, 1), (axes.EMBED, None), std=std, role="router")
    return specs


def moe(
    params: dict,
    state: dict,
    x_BSD: jax.Array,
    cfg: ModelConfig,
    *,
    objective: ObjectiveConfig | None = None,
    compute: ComputeConfig | None = None,
    mask_BS: jax.Array | None = None,
    token_ids_BS: jax.Array | None = None,
    forced_TK: jax.Array | None = None,
    totals: BatchTotals | None = None,
    layout: Layout | None = None,
    stack: tuple | None = None,
    key: jax.Array | None = None,
    carried_BSW: jax.Array | None = None,
) -> tuple[jax.Array, MoEAux]:
    """One MoE layer.

    Args:
      params: values of `param_specs(cfg)`.
      state: router state of this layer, and BARRED or SKIPPED where experts are kept from tokens.
      x_BSD: normalised hidden states.
      cfg: the model.
      objective: what it is trained for; None: nothing is, so no losses, and no route is dropped.
      compute: how it is computed.
      mask_BS: 1 = token, 0 = padding: neither computed by routed experts nor counted.
      token_ids_BS: for routers that look at them.
      forced_TK: expert indices to force; weights are still computed.
      totals: totals of the global batch when this is one micro-batch of it.
      layout: the mesh and its table; None on one device.
      stack: the experts of all layers and this layer's index among them, where `params` is a slice of those.
      key: for routers that draw random numbers.
      carried_BSW: what the router of the MoE layer before passed on, see `nothing_carried`.

    Returns:
      y_BSD and `MoEAux`.
    """
    compute = compute or ComputeConfig()
    b, s, d = x_BSD.shape
    x_TD = x_BSD.reshape(b * s, d)
    flat = lambda a: None if a is None else a.reshape(b * s)  # noqa: E731
    router, static = router_of(cfg.moe.router), cfg.router_config(objective)
    tokens = tokens_of(
        x_TD,
        s,
        flat(mask_BS),
        totals=totals,
        ids_T=flat(token_ids_BS),
        key=key,
        forced_TK=forced_TK,
        carried_TW=None if carried_BSW is None else carried_BSW.reshape(b * s, -1),
    )
    with jax.named_scope("router"):
        out = route(params.get("router", {}), state, tokens, router, static, compute.router_dtype)
    routing, stats, kinds = out.routing, dict(out.stats), router.specials(static)
    special_TN = None
    if isinstance(routing, Routing):
        num_experts = cfg.moe.num_experts
        routing, special_TN, stats["stray"] = specials.split(routing, num_experts, kinds)
    seen_TD = linear(x_TD, params["latent_down"]) if cfg.moe.latent_dim else x_TD
    y_TD, dropped = dispatch(
        params["experts"],
        seen_TD,
        routing,
        cfg.moe,
        compute,
        weighs_inputs=router.weighs_inputs(static),
        capacity_factor=objective.capacity_factor if objective else 0.0,
        layout=layout,
        stack=stack,
    )
    if cfg.moe.latent_dim:
        y_TD = linear(y_TD, params["latent_up"])
    stats["dropped"] = dropped.astype(jnp.float32)
    if kinds and special_TN is not None:
        y_TD = y_TD + specials.combine(params.get("specials", {}), x_TD, special_TN, kinds)
    y_BSD = y_TD.reshape(b, s, d)
    if "shared" in params:
        weights = None if out.shared_TS is None else out.shared_TS.reshape(b, s, -1)
        with jax.named_scope("shared"):
            shared_BSD = ffn(params["shared"], x_BSD, of_experts(cfg.moe), weights)
        if "shared_gate" in params:
            gate = jax.nn.sigmoid(jnp.dot(x_BSD, params["shared_gate"].astype(x_BSD.dtype)))
            shared_BSD = gate * shared_BSD
        y_BSD = y_BSD + shared_BSD
    carry_BSW = None if out.carry_TW is None else out.carry_TW.reshape(b, s, -1)
    losses = {} if objective is None else out.losses  # a router's own losses are for training, too
    return y_BSD, MoEAux(
        losses,
        stats,
        out.routing,
        out.scores_TE,
        carry_BSW,
        choice_TN=out.choice_TN,
        logits_TE=out.logits_TE,
    )


def rounded(params: dict, tokens: Tokens, dtype: str) -> tuple[dict, Tokens]:
    """What a router reads, parameters and hidden states, rounded to `dtype` and as wide as before; untouched
    where that is float32. Gradients are rounded on their way back."""
    if dtype == "float32":
        return params, tokens

    bits = jnp.finfo(dtype)

    def coarse(a):  # not by converting twice: XLA may leave out such a pair
        if not jnp.issubdtype(a.dtype, jnp.floating):
            return a
        return jax.lax.reduce_precision(a, bits.nexp, bits.nmant)

    return jax.tree.map(coarse, params), tokens._replace(x_TD=coarse(tokens.x_TD))


def route(
    params: dict,
    state: dict,
    tokens: Tokens,
    router: Router,
    cfg: RouterConfig,
    dtype: str = "float32",
) -> Routed:
    """The router's routes, without the experts that BARRED or SKIPPED in its state keep from tokens, of what it
    reads in `dtype`. ValueError where it cannot do without an expert, or has no scores by which some could be
    skipped."""
    params, tokens = rounded(params, tokens, dtype)
    own = {name: a for name, a in state.items() if name not in (BARRED, SKIPPED)}
    if BARRED in state:
        tokens = tokens._replace(barred_TE=state[BARRED][None])
    if SKIPPED in state:
        scores_TE = router.route(params, own, tokens, cfg).scores_TE
        if scores_TE is None:
            raise ValueError("this router has no scores: none of its experts is a token's best")
        place_TE = jnp.argsort(jnp.argsort(-jax.lax.stop_gradient(scores_TE), axis=1), axis=1)
        best_TE = place_TE < state[SKIPPED]
        barred_TE = best_TE if tokens.barred_TE is None else best_TE | tokens.barred_TE
        tokens = tokens._replace(barred_TE=barred_TE)
    return router.route(params, own, tokens, cfg)


def nothing_carried(x_BSD: jax.Array, cfg: ModelConfig) -> jax.Array | None:
    """What the first MoE layer's router receives: zeros, or None if the model's router carries nothing."""
    width = router_of(cfg.moe.router).carries(cfg.router_config())
    dtype = jnp.promote_types(x_BSD.dtype, jnp.float32)
    return jnp.zeros((*x_BSD.shape[:2], width), dtype) if width else None

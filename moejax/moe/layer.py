"""The Mixture-of-Experts layer: route -> dispatch -> experts -> combine, plus the shared experts.

DeepSeekMoE (2401.06066) eq. 9: y = shared(x) + sum_k w_k E_k(x); the residual is the block's.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import ModelConfig
from moejax.moe.dispatch import DISPATCHERS
from moejax.moe.dispatch.dropless import dropless
from moejax.moe.dispatch.expert_parallel import expert_parallel
from moejax.moe.experts import expert_param_specs, ffn, ffn_param_specs
from moejax.moe.routers import ROUTERS
from moejax.moe.routing import BatchTotals
from moejax.params import ParamSpec, router_specs
from moejax.sharding import Layout


class MoEAux(NamedTuple):
    """What one layer reports. Unused fields cost nothing under jit.

    Attributes:
      losses: balance losses by name, coefficients applied.
      load_E: routes per expert.
      group_load_G: tokens that reach each balance group.
      dropped: routes that found no slot.
      routing: the router's `Routing` or `SlotRouting`, over T = B*S tokens.
      score_entropy: mean over tokens of the entropy of the normalised scores, in nats; of a micro-batch,
        its share of the mean over the whole batch.
    """

    losses: dict[str, jax.Array]
    load_E: jax.Array
    group_load_G: jax.Array
    dropped: jax.Array
    routing: Any
    score_entropy: jax.Array


def param_specs(cfg: ModelConfig) -> dict:
    moe, d, std = cfg.moe, cfg.d_model, cfg.init_std
    specs = {
        "router": router_specs(ROUTERS[moe.router].param_specs(moe, d, std)),
        "experts": expert_param_specs(moe, d, std),
    }
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
    mask_BS: jax.Array | None = None,
    token_ids_BS: jax.Array | None = None,
    replay_TK: jax.Array | None = None,
    totals: BatchTotals | None = None,
    layout: Layout | None = None,
    stack: tuple | None = None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, MoEAux]:
    """One MoE layer.

    Args:
      params: values of `param_specs(cfg)`.
      state: router state of this layer.
      x_BSD: normalised hidden states.
      cfg: the model's config.
      mask_BS: 1 = token, 0 = padding: neither computed by routed experts nor counted.
      token_ids_BS: for routers that look at them.
      replay_TK: expert indices to force; weights are still computed.
      totals: totals of the global batch when this is one micro-batch of it.
      layout: the mesh and its table; None on one device.
      stack: the experts of all layers and this layer's index among them, where `params` is a slice of those.
      key: for routers that draw random numbers.

    Returns:
      y_BSD and `MoEAux`.
    """
    b, s, d = x_BSD.shape
    x_TD = x_BSD.reshape(b * s, d)
    flat = lambda a: None if a is None else a.reshape(b * s)  # noqa: E731
    out = ROUTERS[cfg.moe.router].route(
        params["router"],
        state,
        x_TD,
        cfg.moe,
        seq_len=s,
        key=key,
        mask_T=flat(mask_BS),
        token_ids_T=flat(token_ids_BS),
        replay_TK=replay_TK,
        totals=totals,
    )
    experts = params["experts"]
    if cfg.moe.dispatcher == "dropless" and layout is not None:
        y_TD, dropped = expert_parallel(experts, x_TD, out.routing, cfg.moe, layout)
    elif cfg.moe.dispatcher == "dropless":
        y_TD, dropped = dropless(experts, x_TD, out.routing, cfg.moe, stack=stack)
    else:  # on a mesh the compiler partitions these: global semantics, one program
        y_TD, dropped = DISPATCHERS[cfg.moe.dispatcher](experts, x_TD, out.routing, cfg.moe)
    y_BSD = y_TD.reshape(b, s, d)
    if "shared" in params:
        shared_BSD = ffn(params["shared"], x_BSD, cfg.moe.activation, cfg.moe.activation_limit)
        if "shared_gate" in params:
            gate = jax.nn.sigmoid(jnp.dot(x_BSD, params["shared_gate"].astype(x_BSD.dtype)))
            shared_BSD = gate * shared_BSD
        y_BSD = y_BSD + shared_BSD
    entropy = _score_entropy(out.scores_TE, flat(mask_BS), totals)
    return y_BSD, MoEAux(out.losses, out.load_E, out.group_load_G, dropped, out.routing, entropy)


def _score_entropy(scores_TE, mask_T, totals):
    p_TE = scores_TE / (scores_TE.sum(axis=-1, keepdims=True) + 1e-20)
    entropy_T = -(p_TE * jnp.log(p_TE + 1e-20)).sum(axis=-1)
    mask_T = jnp.ones_like(entropy_T) if mask_T is None else (mask_T > 0).astype(entropy_T.dtype)
    num_tokens = mask_T.sum() if totals is None else totals.num_tokens
    return jax.lax.stop_gradient((entropy_T * mask_T).sum() / jnp.maximum(num_tokens, 1.0))

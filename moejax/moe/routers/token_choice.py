"""Token choice: each token takes its K best experts. All of DeepSeek's routers are values of its config.

| model                       | score        | normalise | scale | groups       | bias rule     |
|-----------------------------|--------------|-----------|-------|--------------|---------------|
| DeepSeekMoE (2401.06066)    | softmax      | no        | 1     | -            | -             |
| DeepSeek-V2 (2405.04434)    | softmax      | no        | 16    | 3 of 8, max  | -             |
| DeepSeek-V3 (2412.19437)    | sigmoid      | yes       | 2.5   | 4 of 8, top2 | sign          |
| Moonlight (2502.16982)      | sigmoid      | yes       | 2.446 | -            | sign_centered |
| DeepSeek-V4 (2606.19348)    | sqrt_softplus| yes       | 1.5*  | -            | sign          |
| Mixtral, Qwen3-MoE, gpt-oss | softmax      | yes       | 1     | -            | -             |

*V4-Pro: 2.5. Softmax over the selected logits equals softmax over all, renormalised over the selected.
"""

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import MoEConfig
from moejax.moe import balance
from moejax.moe.routing import BatchTotals, Router, RouterOutput, Routing
from moejax.params import ParamSpec


def param_specs(cfg: MoEConfig, d_model: int, std: float) -> dict:
    specs = {"kernel": ParamSpec((d_model, cfg.num_experts), (axes.EMBED, None), std=std)}
    if cfg.router_bias:
        specs["bias"] = ParamSpec((cfg.num_experts,), (None,), init="zeros")
    return specs


def init_state(cfg: MoEConfig) -> dict:
    if cfg.bias_update == "none":
        return {}
    return {"expert_bias": jnp.zeros((cfg.num_experts,), jnp.float32)}


def logits(params: dict, x_TD: jax.Array) -> jax.Array:
    """logits_TE in float32, also under bf16 compute and where a device multiplies float32 with fewer bits
    by default: a rounded score changes which expert is chosen."""
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    kernel = params["kernel"].astype(dtype)
    logits_TE = jnp.dot(x_TD.astype(dtype), kernel, precision=jax.lax.Precision.HIGHEST)
    return logits_TE + params["bias"].astype(dtype)[None] if "bias" in params else logits_TE


def score(logits_TE: jax.Array, kind: str) -> jax.Array:
    """Affinities in float32: softmax over experts, sigmoid, or sqrt(softplus)."""
    if kind == "softmax":
        return jax.nn.softmax(logits_TE, axis=-1)
    if kind == "sigmoid":
        return jax.nn.sigmoid(logits_TE)
    return jnp.sqrt(jax.nn.softplus(logits_TE))


def limit_groups(choice_TE: jax.Array, cfg: MoEConfig) -> jax.Array:
    """Choice scores with the experts outside each token's best `topk_groups` groups at -inf.

    A group is worth its best member (V2, 2405.04434 section 2.2.2) or the sum of its two best biased
    scores (V3, 2412.19437 section 2.1.2).
    """
    if cfg.num_groups == 1:
        return choice_TE
    t = choice_TE.shape[0]
    groups_TGe = choice_TE.reshape(t, cfg.num_groups, -1)
    if cfg.group_score == "max":
        value_TG = groups_TGe.max(axis=-1)
    else:
        value_TG = jax.lax.top_k(groups_TGe, 2)[0].sum(axis=-1)
    _, kept = jax.lax.top_k(value_TG, cfg.topk_groups)
    keep_TG = jax.nn.one_hot(kept, cfg.num_groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(keep_TG[:, :, None], groups_TGe, -jnp.inf).reshape(t, -1)


def route(
    params: dict,
    state: dict,
    x_TD: jax.Array,
    cfg: MoEConfig,
    *,
    seq_len: int,
    key: jax.Array | None = None,
    mask_T: jax.Array | None = None,
    token_ids_T: jax.Array | None = None,
    replay_TK: jax.Array | None = None,
    totals: BatchTotals | None = None,
) -> RouterOutput:
    """See `moejax.moe.routing.Router.route`."""
    del key, token_ids_T  # deterministic, and blind to the token's identity
    logits_TE = logits(params, x_TD)
    dtype = logits_TE.dtype
    scores_TE = score(logits_TE, cfg.score)
    real_T = jnp.ones(x_TD.shape[:1], dtype) if mask_T is None else (mask_T > 0).astype(dtype)

    if replay_TK is None:
        choice_TE = jax.lax.stop_gradient(scores_TE)
        if "expert_bias" in state:
            choice_TE = choice_TE + state["expert_bias"].astype(dtype)[None]
        _, index_TK = jax.lax.top_k(limit_groups(choice_TE, cfg), cfg.experts_per_token)
    else:
        index_TK = replay_TK
    index_TK = jnp.where(real_T[:, None] > 0, index_TK, -1).astype(jnp.int32)

    # one_hot(-1) is all zeros. A product with it, not a gather: its gradient is not a scatter.
    chosen_TKE = jax.nn.one_hot(index_TK, cfg.num_experts, dtype=dtype)
    weights_TK = (chosen_TKE * scores_TE[:, None, :]).sum(axis=-1)
    if cfg.normalize_weights:
        total_T1 = weights_TK.sum(axis=-1, keepdims=True)
        # Padding has no weights at all: dividing by 1 keeps its gradient 0 where 0/1e-20 would be NaN.
        weights_TK = weights_TK / jnp.where(total_T1 > 0, total_T1 + 1e-20, 1.0)
    weights_TK = weights_TK * cfg.routed_scaling

    routes_TE = jax.lax.stop_gradient(chosen_TKE.sum(axis=1))
    load_E = routes_TE.sum(axis=0)
    reached_TG = routes_TE.reshape(-1, cfg.balance_groups, cfg.num_experts // cfg.balance_groups)
    group_load_G = (reached_TG.sum(axis=-1) > 0).astype(dtype).sum(axis=0)
    losses = _losses(
        logits_TE, scores_TE, routes_TE, load_E, group_load_G, real_T, totals, seq_len, cfg
    )
    return RouterOutput(Routing(index_TK, weights_TK), scores_TE, losses, load_E, group_load_G)


def _losses(logits_TE, scores_TE, routes_TE, load_E, group_load_G, mask_T, totals, seq_len, cfg):
    """The active balance losses, times their coefficients."""
    mask_BS = mask_T.reshape(-1, seq_len)
    if totals is None:
        totals = BatchTotals(mask_T.sum(), (mask_BS.max(axis=1) > 0).astype(mask_T.dtype).sum())
    load_E = load_E if totals.load_E is None else totals.load_E
    group_load_G = group_load_G if totals.group_load_G is None else totals.group_load_G
    # Normalised and unbiased: V3 defines its P_i on s_i / sum_j s_j; softmax scores are so already.
    normal_TE = scores_TE
    if cfg.score != "softmax":
        normal_TE = scores_TE / (scores_TE.sum(axis=-1, keepdims=True) + 1e-20)
    score_sum_E = (normal_TE * mask_T[:, None]).sum(axis=0)
    k, n, groups = cfg.experts_per_token, totals.num_tokens, cfg.balance_groups
    losses = {}
    if cfg.expert_loss:
        losses["expert"] = cfg.expert_loss * balance.expert_level(score_sum_E, load_E, n, k)
    if cfg.device_loss:
        losses["device"] = cfg.device_loss * balance.device_level(score_sum_E, load_E, n, k, groups)
    if cfg.communication_loss:
        reach = cfg.topk_groups if cfg.num_groups > 1 else min(k, groups)
        losses["communication"] = cfg.communication_loss * balance.communication(
            score_sum_E, group_load_G, n, reach
        )
    if cfg.sequence_loss:
        by_sequence = lambda a_TE: a_TE.reshape(*mask_BS.shape, -1)  # noqa: E731
        losses["sequence"] = cfg.sequence_loss * balance.sequence_wise(
            by_sequence(normal_TE), by_sequence(routes_TE), mask_BS, totals.num_sequences, k
        )
    if cfg.z_loss:
        losses["z"] = cfg.z_loss * balance.router_z(logits_TE, mask_T, n)
    return losses


def update_state(state: dict, load_E: jax.Array, cfg: MoEConfig) -> dict:
    if not state:
        return state
    bias_E = balance.update_bias(state["expert_bias"], load_E, cfg.bias_update, cfg.bias_rate)
    return {"expert_bias": bias_E}


def linear_losses(cfg: MoEConfig) -> bool:
    """z and sequence-wise are sums over tokens and sequences; the others count over the whole batch."""
    return not (cfg.expert_loss or cfg.device_loss or cfg.communication_loss)


ROUTER = Router(
    param_specs,
    init_state,
    route,
    update_state,
    causal=True,
    form="token",
    linear_losses=linear_losses,
)

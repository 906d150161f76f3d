"""The pure functions that routers share: logits, scores, what is counted, the usual losses."""

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.params import ParamSpec
from moejax.routers import balance
from moejax.routers.contract import RouterConfig, Tokens


def kernel_spec(cfg: RouterConfig, outputs: int | None = None) -> ParamSpec:
    """The router's matrix (D, E), or (D, outputs)."""
    columns = cfg.num_experts if outputs is None else outputs
    return ParamSpec((cfg.d_model, columns), (axes.EMBED, None), std=cfg.init_std)


def logits(params: dict, x_TD: jax.Array) -> jax.Array:
    """logits_TE in float32, also under bf16 compute and where a device multiplies float32 with fewer bits
    by default: a rounded score changes which expert is chosen."""
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    kernel = params["kernel"].astype(dtype)
    logits_TE = jnp.dot(x_TD.astype(dtype), kernel, precision=jax.lax.Precision.HIGHEST)
    return logits_TE + params["bias"].astype(dtype)[None] if "bias" in params else logits_TE


def linear_specs(cfg: RouterConfig) -> dict:
    """A kernel, and a bias on the logits if the options say `router_bias`."""
    specs = {"kernel": kernel_spec(cfg)}
    if cfg.options.router_bias:
        specs["bias"] = ParamSpec((cfg.num_experts,), (None,), init="zeros")
    return specs


def jitter(x_TD: jax.Array, key: jax.Array | None, epsilon: float) -> jax.Array:
    """x times uniform noise from [1 - epsilon, 1 + epsilon], drawn for every element, in float32; x as it is
    without a key. Switch Transformer (2101.03961 section 2.4)."""
    if key is None or epsilon == 0:
        return x_TD
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    return x_TD.astype(dtype) * jax.random.uniform(key, x_TD.shape, dtype, 1 - epsilon, 1 + epsilon)


def unit(a: jax.Array, axis: int) -> jax.Array:
    """a / |a|, and 0 with gradient 0 for what has no direction."""
    square = (a**2).sum(axis=axis, keepdims=True)
    return jnp.where(square > 0, a * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0)), 0.0)


SCORES = ("softmax", "sigmoid", "sqrt_softplus")


def score(logits_TE: jax.Array, kind: str) -> jax.Array:
    """Affinities in float32: softmax over experts, sigmoid, or sqrt(softplus)."""
    if kind == "softmax":
        return jax.nn.softmax(logits_TE, axis=-1)
    if kind == "sigmoid":
        return jax.nn.sigmoid(logits_TE)
    return jnp.sqrt(jax.nn.softplus(logits_TE))


def entropy_sum(scores_TE: jax.Array, mask_T: jax.Array) -> jax.Array:
    """Sum over tokens of the entropy of the normalised scores, in nats."""
    p_TE = scores_TE / (scores_TE.sum(axis=-1, keepdims=True) + 1e-20)
    entropy_T = -(p_TE * jnp.log(p_TE + 1e-20)).sum(axis=-1)
    return jax.lax.stop_gradient((entropy_T * mask_T).sum())


def chosen(index_TK: jax.Array, num_experts: int, dtype) -> jax.Array:
    """One-hot [T, K, E] of the chosen experts; an empty slot (-1) is all zeros."""
    return jax.nn.one_hot(index_TK, num_experts, dtype=dtype)


def select(choice_TE: jax.Array, tokens: Tokens, most: int, open_TE=None) -> jax.Array:
    """expert_index_TK: the `most` largest of each token, best first, or those it is forced to; -1 in every slot
    of padding, and where fewer are open and not barred.

    Args:
      choice_TE: what decides, also of special experts. No gradient passes.
      tokens: their mask, forced routes and barred experts.
      most: K.
      open_TE: which experts a token may have; None: all.
    """
    index_TK = tokens.forced_TK
    if index_TK is None:
        choice_TE = bar(jax.lax.stop_gradient(choice_TE), tokens)
        if open_TE is not None:
            choice_TE = jnp.where(open_TE, choice_TE, -jnp.inf)
        choice_TK, index_TK = jax.lax.top_k(choice_TE, most)
        if open_TE is not None or tokens.barred_TE is not None:
            index_TK = jnp.where(choice_TK > -jnp.inf, index_TK, -1)
    return but_padding(index_TK, tokens)


def bar(choice_TE: jax.Array, tokens: Tokens) -> jax.Array:
    """What decides, -inf for barred experts; special experts, which come last, are never barred."""
    if tokens.barred_TE is None:
        return choice_TE
    specials = choice_TE.shape[1] - tokens.barred_TE.shape[1]
    return jnp.where(jnp.pad(tokens.barred_TE, ((0, 0), (0, specials))), -jnp.inf, choice_TE)


def refuse_barred(tokens: Tokens, why: str) -> None:
    """ValueError, if an expert is barred, of a router that cannot do without. `why` begins the sentence."""
    if tokens.barred_TE is not None:
        raise ValueError(
            f"{why}: no expert can be barred; setting its output weights to zero would work"
        )


def but_padding(index_TK: jax.Array, tokens: Tokens) -> jax.Array:
    """The routes, int32, with -1 in every slot of padding."""
    return jnp.where(tokens.mask_T[:, None] > 0, index_TK, -1).astype(jnp.int32)


def pick(values_TE: jax.Array, chosen_TKE: jax.Array) -> jax.Array:
    """The chosen of values (T, E) or (1, E), 0 in an empty slot. A product with the one-hot, not a gather: its
    gradient is not a scatter."""
    return (chosen_TKE * values_TE[:, None, :]).sum(axis=-1)


def weigh(index_TK: jax.Array, values_TE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values of a token's experts, weights_TK, 0 in empty slots; and routes_TE, 1 where it has the expert,
    without gradient."""
    chosen_TKE = chosen(index_TK, values_TE.shape[1], values_TE.dtype)
    return pick(values_TE, chosen_TKE), jax.lax.stop_gradient(chosen_TKE.sum(axis=1))


def normalized(weights_TK: jax.Array) -> jax.Array:
    """Weights over their sum."""
    return divided(weights_TK, weights_TK.sum(axis=-1, keepdims=True))


def divided(values_TN: jax.Array, by_T1: jax.Array) -> jax.Array:
    """values / by. Where `by` is 0 there are no weights at all (padding): dividing by 1 keeps their gradient 0
    where 0/1e-20 would be NaN."""
    return values_TN / jnp.where(by_T1 > 0, by_T1 + 1e-20, 1.0)


def p_norm(weights_TK: jax.Array, power: float) -> jax.Array:
    """(sum_k w_k^p)^(1/p) of weights that are not negative, (T, 1)."""
    if power == 1:
        return weights_TK.sum(axis=-1, keepdims=True)
    powers_T1 = (weights_TK**power).sum(axis=-1, keepdims=True)
    return jnp.where(powers_T1 > 0, jnp.where(powers_T1 > 0, powers_T1, 1.0) ** (1 / power), 0.0)


def group_load(routes_TE: jax.Array, num_groups: int) -> jax.Array:
    """Tokens with a route into each of `num_groups` equal groups of experts."""
    reached_TG = routes_TE.reshape(routes_TE.shape[0], num_groups, -1).max(axis=-1)
    return (reached_TG > 0).astype(routes_TE.dtype).sum(axis=0)


def plain_stats(routes_TE: jax.Array, scores_TE: jax.Array, tokens: Tokens) -> dict:
    """The stats of every router with scores: load and score entropy."""
    load_E = jax.lax.stop_gradient(routes_TE).sum(axis=0)
    return {"load": load_E, "score_entropy": entropy_sum(scores_TE, tokens.mask_T)}


def token_stats(
    routes_TE: jax.Array, scores_TE: jax.Array, tokens: Tokens, cfg: RouterConfig
) -> dict:
    """The stats of most routers: `plain_stats`, and what the active losses count."""
    routes_TE = jax.lax.stop_gradient(routes_TE)
    stats = plain_stats(routes_TE, scores_TE, tokens)
    if cfg.balance.communication_loss:
        stats["group_load"] = group_load(routes_TE, cfg.balance.balance_groups)
    return stats


def z_loss(logits_TE: jax.Array, tokens: Tokens, cfg: RouterConfig) -> dict[str, jax.Array]:
    """The z-loss alone, if it is active."""
    if not cfg.balance.z_loss:
        return {}
    z = balance.router_z(logits_TE, tokens.mask_T, tokens.totals.num_tokens)
    return {"z": cfg.balance.z_loss * z}


# Fields of `BalanceConfig` that `token_losses` honours.
TOKEN_LOSSES = ("expert_loss", "sequence_loss", "device_loss", "communication_loss", "z_loss")


def token_losses(
    logits_TE: jax.Array,
    scores_TE: jax.Array,
    routes_TE: jax.Array,
    stats: dict,
    tokens: Tokens,
    cfg: RouterConfig,
    *,
    normalized: bool,
    groups_per_token: int = 0,
) -> dict[str, jax.Array]:
    """The active losses of `BalanceConfig`, times their coefficients.

    Args:
      logits_TE, scores_TE: of the experts.
      routes_TE: 1 where the token selected the expert.
      stats: from `token_stats`.
      tokens: their mask and totals.
      cfg: coefficients and sizes.
      normalized: the scores of a token sum to 1 already. V3 defines its P_i on s_i / sum_j s_j.
      groups_per_token: balance groups a token may reach; 0: as many as it has experts, if there are so many.
    """
    b, k, n = cfg.balance, cfg.experts_per_token, tokens.totals.num_tokens
    groups_per_token = groups_per_token or min(k, b.balance_groups)
    normal_TE = scores_TE
    if not normalized:
        normal_TE = scores_TE / (scores_TE.sum(axis=-1, keepdims=True) + 1e-20)
    score_sum_E = (normal_TE * tokens.mask_T[:, None]).sum(axis=0)
    losses = {}
    if b.expert_loss:
        load_E = tokens.total(stats, "load")
        losses["expert"] = b.expert_loss * balance.expert_level(score_sum_E, load_E, n, k)
    if b.device_loss:
        load_E = tokens.total(stats, "load")
        loss = balance.device_level(score_sum_E, load_E, n, k, b.balance_groups)
        losses["device"] = b.device_loss * loss
    if b.communication_loss:
        load_G = tokens.total(stats, "group_load")
        loss = balance.communication(score_sum_E, load_G, n, groups_per_token)
        losses["communication"] = b.communication_loss * loss
    if b.sequence_loss:
        mask_BS = tokens.mask_BS
        by_sequence = lambda a_TE: a_TE.reshape(*mask_BS.shape, -1)  # noqa: E731
        losses["sequence"] = b.sequence_loss * balance.sequence_wise(
            by_sequence(normal_TE), by_sequence(routes_TE), mask_BS, tokens.totals.num_sequences, k
        )
    return losses | z_loss(logits_TE, tokens, cfg)

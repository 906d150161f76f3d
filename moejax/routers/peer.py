"""PEER (2407.04153): product keys find a token's K experts among very many, each of them a single neuron.

H heads with k = K / H experts each. A head's query has two halves; each is compared with n = sqrt(E) keys, and
expert i n + j scores q1 . key1_i + q2 . key2_j. The k best pairs lie among the k best of each half, so n^2
experts are searched by 2 n + k^2 products. A head weighs its k by a softmax over their scores; heads share
keys and experts (algorithm 1, section 2.2). An expert that several heads find is one route with the sum of its
weights: the other slot stays empty.

An expert is u_i act(v_i . x): model.moe.d_expert=1 and an activation that is not gated. The paper normalises
queries with BatchNorm, whose statistics need the batch; here each half of each head's query has its mean
square set to 1 and a learned scale ('rms'), or is taken as it is ('none').

Causal. No state; the paper needs no loss. It claims lower perplexity than dense and coarse MoE models of equal
compute, with up to a million experts.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.options import Problems, choice, number
from moejax.params import ParamSpec
from moejax.routers import parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    heads: int = number(8, least=1)  # H; each finds experts_per_token / heads experts
    key_dim: int = number(128, least=2)  # width of a head's query; a key is half as wide
    query_norm: str = choice("rms", "none")  # of a query before it is compared


def num_keys(cfg: RouterConfig) -> int:
    """n, keys of each half."""
    return math.isqrt(cfg.num_experts)


def param_specs(cfg: RouterConfig) -> dict:
    o, std = cfg.options, cfg.init_std
    key = ParamSpec((num_keys(cfg), o.key_dim // 2), (None, None), std=std)
    specs = {
        "query": ParamSpec((cfg.d_model, o.heads * o.key_dim), (axes.EMBED, None), std=std),
        "keys_1": key,
        "keys_2": key,
    }
    if o.query_norm == "rms":
        specs["query_scale"] = ParamSpec(
            (2, o.key_dim // 2), (None, None), init="ones", role="vector"
        )
    return specs


def key_scores(params: dict, x_TD: jax.Array, o: Options) -> tuple[jax.Array, jax.Array]:
    """Scores of both halves, [T, H, n], float32."""
    dtype, high = jnp.promote_types(x_TD.dtype, jnp.float32), jax.lax.Precision.HIGHEST
    p = {name: a.astype(dtype) for name, a in params.items()}
    query = jnp.dot(x_TD.astype(dtype), p["query"], precision=high)
    query_THij = query.reshape(x_TD.shape[0], o.heads, 2, -1)
    if o.query_norm == "rms":
        square = (query_THij**2).mean(axis=-1, keepdims=True)
        query_THij = query_THij * jax.lax.rsqrt(square + 1e-6) * p["query_scale"][None, None]
    first, second = (
        jnp.einsum("THj,nj->THn", query_THij[:, :, i], p[f"keys_{i + 1}"], precision=high)
        for i in (0, 1)
    )
    return first, second


def find(first_THn: jax.Array, second_THn: jax.Array, k: int) -> jax.Array:
    """The k best experts of each head, int32 [T, H, k]."""
    n = first_THn.shape[-1]
    (value_1, key_1), (value_2, key_2) = (
        jax.lax.top_k(jax.lax.stop_gradient(a), min(k, n)) for a in (first_THn, second_THn)
    )
    pairs = value_1[..., :, None] + value_2[..., None, :]
    expert = n * key_1[..., :, None] + key_2[..., None, :]
    flat = (*pairs.shape[:2], -1)
    _, best = jax.lax.top_k(pairs.reshape(flat), k)
    return jnp.take_along_axis(expert.reshape(flat), best, axis=-1).astype(jnp.int32)


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`. Weights follow from the set of a token's experts alone: a head's k best of them are
    its own, so that forced routes are weighed like found ones."""
    del state
    o, n = cfg.options, num_keys(cfg)
    k = cfg.experts_per_token // o.heads
    first_THn, second_THn = key_scores(params, tokens.x_TD, o)
    index_TK = tokens.forced_TK
    if index_TK is None:
        parts.refuse_barred(tokens, "peer finds its experts by two halves of a key")
        index_TK = find(first_THn, second_THn, k).reshape(tokens.x_TD.shape[0], -1)
        index_TK = jnp.sort(index_TK, axis=1)
        again_TK = jnp.pad(index_TK[:, 1:] == index_TK[:, :-1], ((0, 0), (1, 0)))
        index_TK = jnp.where(again_TK, -1, index_TK)
    index_TK = parts.but_padding(index_TK, tokens)

    filled_T1K = (index_TK >= 0)[:, None]
    at_TK = jnp.maximum(index_TK, 0)
    score_THK = jnp.take_along_axis(first_THn, (at_TK // n)[:, None], axis=2)
    score_THK = score_THK + jnp.take_along_axis(second_THn, (at_TK % n)[:, None], axis=2)
    ranked = jnp.where(filled_T1K, jax.lax.stop_gradient(score_THK), -jnp.inf)
    place_THK = jnp.argsort(jnp.argsort(-ranked, axis=2), axis=2)
    mine_THK = filled_T1K & (place_THK < k)
    weights_THK = jax.nn.softmax(jnp.where(mine_THK, score_THK, -1e30), axis=2)
    weights_TK = jnp.where(mine_THK, weights_THK, 0).sum(axis=1)
    load_E = jnp.zeros((cfg.num_experts,), weights_TK.dtype)
    load_E = load_E.at[at_TK].add((index_TK >= 0).astype(load_E.dtype))
    return Routed(Routing(index_TK, weights_TK), {}, {"load": load_E})


def problems(cfg: RouterConfig, prefix: str) -> list[str]:
    o, e, k, out = cfg.options, cfg.num_experts, cfg.experts_per_token, Problems()
    n, key = num_keys(cfg), f"{prefix}router."
    out.need(
        n * n == e,
        f"{prefix}num_experts={e} must be a square for product keys; {n**2} or {(n + 1) ** 2} would work",
    )
    out.need(
        k % o.heads == 0,
        f"{prefix}experts_per_token={k} must be a multiple of {key}heads={o.heads}",
    )
    out.need(o.key_dim % 2 == 0, f"{key}key_dim={o.key_dim} must be even: a query has two halves")
    return out


ROUTER = Router(
    options=Options(),
    source="PEER, 2407.04153",
    about=__doc__ or "",
    recipe=(
        ("model.moe.num_experts", 128**2),  # the smallest of the paper's, up to 1024**2
        ("model.moe.experts_per_token", 128),
        ("model.moe.d_expert", 1),
        ("model.moe.activation", "gelu_tanh"),
    ),
    route=route,
    form="token",
    causal=True,
    param_specs=param_specs,
    linear_losses=lambda cfg: True,
    problems=problems,
)

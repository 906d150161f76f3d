"""What the experts compute: the output of every route, routes under rounding, experts side by side. Pure.

Here: F folds; P probe tokens; X = T K routes.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ComputeConfig, ModelConfig
from moejax.evals.analysis.counts import fold_sums, hot_experts
from moejax.evals.analysis.units import FOLDS
from moejax.evals.routes import Routes, by_token
from moejax.linear import linear
from moejax.moe.dispatch import dispatch
from moejax.moe.experts import expert_ffn_slots, of_experts
from moejax.moe.layer import rounded
from moejax.routers import router_of
from moejax.routers.contract import Routing, tokens_of

_ROUTES_AT_ONCE = 8192


def route_outputs(
    layer: dict,
    x_TD: jax.Array,
    expert_TK: jax.Array,
    weights_TK: jax.Array,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> jax.Array:
    """f_e(x) of every route, [T, K, D], not weighted; zero for empty slots and special experts. With
    `latent_dim`, D is the latent's width. Where weights multiply what an expert reads, f_e(w x).

    `layer`: the parameters of one MoE layer.
    """
    num_tokens, k = expert_TK.shape
    weighs_inputs = router_of(cfg.moe.router).weighs_inputs(cfg.router_config())
    seen_TD = linear(x_TD, layer["latent_down"]) if cfg.moe.latent_dim else x_TD
    rows_TKD = jnp.broadcast_to(seen_TD[:, None], (num_tokens, k, seen_TD.shape[1]))
    if weighs_inputs:
        rows_TKD = (rows_TKD * weights_TK[:, :, None]).astype(seen_TD.dtype)
    expert_X1 = jnp.where(expert_TK < cfg.moe.num_experts, expert_TK, -1).reshape(-1, 1)
    alone = Routing(expert_X1, (expert_X1 >= 0).astype(jnp.float32))
    y_XD, _ = dispatch(
        layer["experts"], rows_TKD.reshape(-1, seen_TD.shape[1]), alone, cfg.moe, compute
    )
    return y_XD.reshape(num_tokens, k, -1)


def output_sums(
    params: dict,
    routes: Routes,
    segment_BS: jax.Array,
    unit_B: jax.Array,
    cfg: ModelConfig,
    compute: ComputeConfig,
) -> dict[str, jax.Array]:
    """Sums over the routes of a batch, float32, here with f = `route_outputs` and g its weight:

    gate_norm [L, F, E]  sum of g |f|_2, as REAP weighs (2510.13999); |f| where weights multiply the input.
    most [L, E]          the greatest |f_d| over all tokens and d, which finds super experts (2507.23279).
    """
    experts = cfg.moe.num_experts
    num_tokens, k = routes.expert_LTK.shape[1:]
    unit_T = jnp.broadcast_to(unit_B[:, None], segment_BS.shape).reshape(num_tokens)
    unweighed = router_of(cfg.moe.router).weighs_inputs(cfg.router_config())
    pieces = max(1, -(-num_tokens * k // _ROUTES_AT_ONCE))
    while num_tokens % pieces:
        pieces += 1

    def one_layer(_, layer):
        moe, x_TD, expert_TK, weights_TK = layer

        def one_piece(part):
            x, expert, weights = part
            y_TKD = route_outputs(moe, x, expert, weights, cfg, compute).astype(jnp.float32)
            return jnp.sqrt(jnp.sum(y_TKD**2, axis=-1)), jnp.abs(y_TKD).max(axis=-1)

        split = lambda a: a.reshape(pieces, -1, *a.shape[1:])  # noqa: E731
        norm, most = jax.lax.map(one_piece, jax.tree.map(split, (x_TD, expert_TK, weights_TK)))
        norm_TK, most_TK = norm.reshape(expert_TK.shape), most.reshape(expert_TK.shape)
        good_TK = (expert_TK >= 0) & (expert_TK < experts)
        gate_TK = jnp.ones_like(norm_TK) if unweighed else weights_TK.astype(jnp.float32)
        where_TK = jnp.where(good_TK, (unit_T % FOLDS)[:, None] * experts + expert_TK, 0)

        weighed_R = jnp.where(good_TK, gate_TK * norm_TK, 0).reshape(-1)
        gate_norm = jax.ops.segment_sum(weighed_R, where_TK.reshape(-1), FOLDS * experts)
        most_E = (
            jnp.zeros(experts)
            .at[jnp.where(good_TK, expert_TK, 0)]
            .max(jnp.where(good_TK, most_TK, 0))
        )
        return None, {"gate_norm": gate_norm.reshape(FOLDS, experts), "most": most_E}

    layers = params["moe_blocks"]["moe"], routes.inputs_LTD, routes.expert_LTK, routes.weights_LTK
    return jax.lax.scan(one_layer, None, layers)[1]


def rounding_sums(
    params: dict,
    router_state: dict,
    routes: Routes,
    batch: dict[str, jax.Array],
    unit_B: jax.Array,
    cfg: ModelConfig,
) -> dict[str, jax.Array]:
    """Routes lost when a layer's router reads bfloat16, [L, F]: `flipped`, of `routed`. Both what it reads and
    its own parameters are rounded, in this layer alone; it computes in float32 as ever."""
    router, static = router_of(cfg.moe.router), cfg.router_config()
    segment_BS = batch["segment_ids"]
    real_T = (segment_BS > 0).reshape(-1)
    unit_T = jnp.broadcast_to(unit_B[:, None], segment_BS.shape).reshape(-1)

    def one_layer(_, layer):
        moe, state, x_TD, expert_TK = layer
        ids_T = batch["tokens"].reshape(-1)
        tokens = tokens_of(x_TD, segment_BS.shape[1], real_T, ids_T=ids_T)
        own, tokens = rounded(moe.get("router", {}), tokens, "bfloat16")
        other_TK, _ = by_token(router.route(own, state, tokens, static).routing, real_T.size)
        total = cfg.moe.num_experts + len(router.specials(static))
        before_TE = hot_experts(expert_TK, total) * real_T[:, None]
        lost_TE = before_TE * (1 - hot_experts(other_TK, total))
        counted = {"flipped": lost_TE.sum(axis=1), "routed": before_TE.sum(axis=1)}
        return None, {name: fold_sums(a, unit_T) for name, a in counted.items()}

    state = router_state.get("moe_blocks", {})
    layers = params["moe_blocks"]["moe"], state, routes.inputs_LTD, routes.expert_LTK
    return jax.lax.scan(one_layer, None, layers)[1]


def probe_rows(segment_BS: np.ndarray, most: int = 128) -> np.ndarray:
    """Places of at most `most` tokens of a batch, evenly spread over those that are not padding."""
    real = np.flatnonzero(np.asarray(segment_BS).reshape(-1) > 0)
    return real[np.unique(np.linspace(0, len(real) - 1, min(most, len(real))).astype(int))]


def similarity(
    params: dict, probe_LPD: jax.Array, order_P: jax.Array, cfg: ModelConfig
) -> dict[str, jax.Array]:
    """How alike the experts of each layer are, [L, E, E], float32:

    weights          mean over their matrices of the cosine between two experts' entries.
    outputs          mean over the probe tokens of cos(f_i(x), f_j(x)): all experts compute all of them.
    cka              linear CKA (1905.00414): |Y_i^T Y_j|^2 / (|Y_i^T Y_i| |Y_j^T Y_j|), Frobenius, of outputs
                     Y with their mean over tokens taken out.
    weights_chance   the same with expert j's entries moved by one place.
    outputs_chance, cka_chance   the same with expert j's tokens in another order, `order_P`.

    `probe_LPD`: what each layer read at the probe tokens.
    """

    def unit(a, axes):
        return a / jnp.maximum(jnp.sqrt((a**2).sum(axis=axes, keepdims=True)), 1e-30)

    def one_layer(_, layer):
        moe, x_PD = layer
        seen_PD = linear(x_PD, moe["latent_down"]) if cfg.moe.latent_dim else x_PD
        x_EPD = jnp.broadcast_to(seen_PD, (cfg.moe.num_experts, *seen_PD.shape))
        y_EPD = expert_ffn_slots(moe["experts"], x_EPD, of_experts(cfg.moe)).astype(jnp.float32)
        cosines, by_chance = [], []
        for name, w in moe["experts"].items():
            if name.startswith("w_"):
                flat = unit(w.astype(jnp.float32).reshape(w.shape[0], -1), (1,))
                cosines.append(jnp.dot(flat, flat.T, precision="highest"))
                by_chance.append(jnp.dot(flat, jnp.roll(flat, 1, axis=1).T, precision="highest"))
        one_EPD, centred_EPD = unit(y_EPD, (2,)), y_EPD - y_EPD.mean(axis=1, keepdims=True)
        gram_EPP = unit(jnp.einsum("EPD,EQD->EPQ", centred_EPD, centred_EPD), (1, 2))
        mixed_EPP = gram_EPP[:, order_P][:, :, order_P]
        cos = lambda a, b: jnp.einsum("EPD,GPD->EG", a, b) / x_PD.shape[0]  # noqa: E731
        inner = lambda a, b: jnp.einsum("EPQ,GPQ->EG", a, b)  # noqa: E731
        return None, {
            "weights": sum(cosines) / len(cosines),
            "weights_chance": sum(by_chance) / len(by_chance),
            "outputs": cos(one_EPD, one_EPD),
            "outputs_chance": cos(one_EPD, one_EPD[:, order_P]),
            "cka": inner(gram_EPP, gram_EPP),
            "cka_chance": inner(gram_EPP, mixed_EPP),
        }

    layers = params["moe_blocks"]["moe"], probe_LPD
    return jax.lax.scan(one_layer, None, layers)[1]

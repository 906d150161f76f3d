"""What routers did: pure functions from loads and logits to the numbers that people watch.

Here: N bins of logits.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.routers.contract import MergeRouting, Routing, SoftRouting

# Between bins of logits, from 1/16 to 1024 on both sides of 0: two of them double a logit.
LOGIT_EDGES = tuple(float(s * 2 ** (i / 2)) for s in (-1, 1) for i in range(-8, 21)[::s])


def max_violation(load_E: jax.Array) -> jax.Array:
    """MaxVio = max(load)/mean(load) - 1 (2408.15664 section 4.1); 0 is perfect balance. Last axis: E."""
    mean = jnp.maximum(load_E.mean(axis=-1), 1e-9)
    return load_E.max(axis=-1) / mean - 1.0


def load_entropy(load_E: jax.Array) -> jax.Array:
    """Entropy of the load over experts divided by log E: 1 is uniform, 0 a single expert."""
    p_E = load_E / jnp.maximum(load_E.sum(axis=-1, keepdims=True), 1e-9)
    plogp = jnp.where(p_E > 0, p_E * jnp.log(jnp.maximum(p_E, 1e-30)), 0.0)
    return -plogp.sum(axis=-1) / jnp.log(float(load_E.shape[-1]))


def dead_experts(load_E: jax.Array) -> jax.Array:
    """Number of experts that received no token."""
    return (load_E == 0).sum(axis=-1)


def summarize(stats: dict[str, jax.Array], num_experts: int, num_tokens) -> dict[str, jax.Array]:
    """Scalars for logging from one step's stats (`MoEAux.stats`, a leading axis of layers), each computed per
    layer and then averaged. Special experts are used, not balanced."""
    routes_L = stats["load"].sum(axis=-1)
    load_LE = stats["load"][:, :num_experts]
    out = {
        "max_vio": max_violation(load_LE).mean(),
        "load_entropy": load_entropy(load_LE).mean(),
        "dead_experts": dead_experts(load_LE).astype(jnp.float32).mean(),
        "drop_fraction": stats["dropped"].sum() / jnp.maximum(routes_L.sum(), 1.0),
        "experts_per_token": (load_LE.sum(axis=-1) / jnp.maximum(num_tokens, 1.0)).mean(),
    }
    if "stray" in stats:
        out["stray_routes"] = stats["stray"].sum()
    if "score_entropy" in stats:
        out["score_entropy"] = (stats["score_entropy"] / jnp.maximum(num_tokens, 1.0)).mean()
    return out


def logit_counts(logits_TE: jax.Array, mask_T: jax.Array) -> jax.Array:
    """How many logits of tokens that are not padding lie below the first of LOGIT_EDGES, between two, and above
    the last: int32 [len(LOGIT_EDGES) + 1]. A logit on an edge is above it."""
    edges = jnp.asarray(LOGIT_EDGES, logits_TE.dtype)
    bin_TE = jnp.searchsorted(edges, logits_TE, side="right")
    seen_TE = jnp.broadcast_to((mask_T > 0)[:, None], bin_TE.shape).astype(jnp.int32)
    return jnp.zeros((len(edges) + 1,), jnp.int32).at[bin_TE].add(seen_TE)


def size_below(counts_N: np.ndarray, edges: Sequence[float], share: float) -> float:
    """The smallest edge such that this share of the counted logits has no greater absolute value; inf if the
    outermost bins hold too many; 0 if none was counted. `edges` are symmetric about 0."""
    counts_N = np.asarray(counts_N)
    positive = np.asarray(edges)[len(edges) // 2 :]
    middle = len(edges) // 2
    # Bins from the middle outwards, both sides of each size together.
    by_size = counts_N[middle:] + np.concatenate([[0], counts_N[:middle][::-1]])
    if not by_size.sum():
        return 0.0
    enough = np.cumsum(by_size) >= share * by_size.sum()
    return float([*positive, np.inf][int(enough.argmax())])


def load_by_label(routing, label_T: jax.Array, num_labels: int, num_experts: int) -> jax.Array:
    """Routes to each expert of the tokens with each label (domains, vocabulary entries), int32 [label, E].

    `routing` is of any form of `moejax.routers.contract`; empty slots and special experts do not count. In a
    soft routing a token counts by the share of an expert's slots that it fills, where experts are merged by the
    weights of its group (padding in that group, too), float32.
    """
    if isinstance(routing, SoftRouting | MergeRouting):
        if isinstance(routing, SoftRouting):
            share_TE = routing.dispatch_BSEC.sum(axis=3).reshape(-1, num_experts)
        else:
            size = label_T.shape[0] // routing.weights_GE.shape[0]
            share_TE = jnp.repeat(routing.weights_GE, size, axis=0)
        return jnp.zeros((num_labels, num_experts), share_TE.dtype).at[label_T].add(share_TE)
    if isinstance(routing, Routing):
        expert = routing.expert_index_TK
        label = jnp.broadcast_to(label_T[:, None], expert.shape)
        filled = (expert >= 0) & (expert < num_experts)
    else:
        token_EC = routing.token_index_EC
        expert = jnp.broadcast_to(jnp.arange(num_experts)[:, None], token_EC.shape)
        label = label_T[token_EC]
        filled = token_EC >= 0
    zeros = jnp.zeros((num_labels, num_experts), jnp.int32)
    return zeros.at[label, jnp.where(filled, expert, 0)].add(filled.astype(jnp.int32))

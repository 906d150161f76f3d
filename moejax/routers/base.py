"""BASE (2103.16716): in training every expert gets the same number of tokens, by a balanced assignment.

Scores are h_t . w_e; training solves max sum_t h_t . w_a(t) subject to T / E tokens for each expert (eq. 1);
evaluation and generation take the best expert of each token. The expert's output is weighed by sigmoid(h_t .
w_e) (eq. 2). One expert a token. No loss balances: the assignment does.

The assignment is an auction (Bertsekas): every token without an expert bids for the one that is worth most
to it, an expert keeps its highest bids and raises its price. It ends with a mean score at most `epsilon`
times the largest gap between a token's best and worst score below the best possible; a smaller epsilon
takes more rounds. (0.02 as in the authors' code.) If E does not divide the number of tokens, an expert
takes at most that quotient, rounded up; padding is assigned to nobody. The tokens that compete are those of
one micro-batch.

Not causal in training, where other tokens may take an expert from this one; causal in evaluation. No state.
The paper claims balance without a loss and better perplexity than Switch and dense models of equal compute. It
starts from orthogonal expert vectors and shuffles tokens over workers first; here vectors start normal, and
one auction sees them all.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import Problems, number
from moejax.routers import parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    # Least raise of a bid, relative to the largest gap between a token's best and worst score.
    epsilon: float = number(0.02, least=1e-4)


def assign(scores_TE: jax.Array, mask_T: jax.Array, epsilon: float) -> jax.Array:
    """Each token's expert, int32, -1 for padding: at most ceil(tokens / E) tokens for one, and a mean score
    within epsilon * gap of the best, where gap is the largest between a token's best and worst score.

    Args:
      scores_TE: what a token is worth to an expert.
      mask_T: 1 = token, 0 = padding.
      epsilon: least raise, relative to that gap; from 1e-4, so that it shows beside prices in float32.
    """
    num_tokens, num_experts = scores_TE.shape
    here_T = mask_T > 0
    # Finite, whatever a diverging model says: with NaN nobody would ever win.
    scores_TE = jnp.clip(jnp.nan_to_num(jax.lax.stop_gradient(scores_TE)), -1e9, 1e9)
    # Beside a token's best: the same problem, and a small raise shows beside small numbers.
    scores_TE = jnp.where(here_T[:, None], scores_TE - scores_TE.max(axis=1, keepdims=True), 0)
    if num_experts == 1:
        return jnp.where(here_T, 0, -1).astype(jnp.int32)
    step = 1e-6 - epsilon * scores_TE.min()
    room = -(-here_T.sum().astype(jnp.int32) // num_experts)
    at_T = jnp.arange(num_tokens, dtype=jnp.int32)

    def auction(carry):
        expert_T, bid_T, price_E = carry
        worth_TE = scores_TE - price_E[None]
        first_T = worth_TE.argmax(axis=1).astype(jnp.int32)
        others_TE = jnp.where(first_T[:, None] == jnp.arange(num_experts)[None], -jnp.inf, worth_TE)
        raised_T = price_E[first_T] + worth_TE.max(axis=1) - others_TE.max(axis=1) + step
        free_T = here_T & (expert_T < 0)
        bid_T = jnp.where(free_T, raised_T, bid_T)
        wanted_T = jnp.where(free_T, first_T, expert_T)
        # Each expert's bids in falling order: it keeps the first `room`, padding wants no expert.
        wanted_T = jnp.where(here_T, wanted_T, num_experts)
        order_T = jnp.lexsort((-bid_T, wanted_T))
        count_E = jnp.zeros((num_experts + 1,), jnp.int32).at[wanted_T].add(1)
        start_E = jnp.cumsum(count_E) - count_E
        place_T = jnp.zeros_like(at_T).at[order_T].set(at_T) - start_E[wanted_T]
        kept_T = here_T & (place_T < room)
        lowest_E = jnp.full((num_experts + 1,), jnp.inf, bid_T.dtype)
        lowest_E = lowest_E.at[wanted_T].min(jnp.where(kept_T, bid_T, jnp.inf))
        price_E = jnp.where(count_E >= room, lowest_E, 0)[:-1]
        return jnp.where(kept_T, wanted_T, -1), bid_T, price_E

    start = (
        jnp.full((num_tokens,), -1, jnp.int32),
        jnp.zeros((num_tokens,), scores_TE.dtype),
        jnp.zeros((num_experts,), scores_TE.dtype),
    )
    unassigned = lambda carry: (here_T & (carry[0] < 0)).any()  # noqa: E731
    return jax.lax.while_loop(unassigned, auction, start)[0]


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del state
    logits_TE = parts.logits(params, tokens.x_TD)
    if tokens.forced_TK is not None:
        index_T = tokens.forced_TK[:, 0]
    elif cfg.training:
        parts.refuse_barred(tokens, "base gives every expert its share of the tokens in training")
        index_T = assign(logits_TE, tokens.mask_T, cfg.options.epsilon)
    else:
        best_T1, index_T1 = jax.lax.top_k(parts.bar(logits_TE, tokens), 1)
        index_T = jnp.where(best_T1 > -jnp.inf, index_T1, -1)[:, 0]
    index_TK = jnp.where(tokens.mask_T > 0, index_T, -1).astype(jnp.int32)[:, None]
    gates_TE = jax.nn.sigmoid(logits_TE)
    chosen_TE = parts.chosen(index_TK, cfg.num_experts, gates_TE.dtype)[:, 0]
    weights_TK = (chosen_TE * gates_TE).sum(axis=1, keepdims=True)
    stats = {"load": jax.lax.stop_gradient(chosen_TE.sum(axis=0))}
    losses = parts.z_loss(logits_TE, tokens, cfg)
    return Routed(Routing(index_TK, weights_TK), losses, stats, gates_TE, logits_TE=logits_TE)


def problems(cfg: RouterConfig, prefix: str) -> list[str]:
    out = Problems()
    out.need(
        cfg.experts_per_token == 1,
        f"{prefix}experts_per_token={cfg.experts_per_token}: {prefix}router.name='base' assigns one expert "
        "to a token; 1 would work, or the router 'sinkhorn' for more",
    )
    return out


ROUTER = Router(
    options=Options(),
    source="BASE Layers, 2103.16716",
    about=__doc__ or "",
    recipe=(("model.moe.experts_per_token", 1),),
    route=route,
    form="token",
    causal=True,
    causal_in_training=False,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    linear_losses=lambda cfg: True,
    balance=("z_loss",),
    problems=problems,
)

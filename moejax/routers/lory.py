"""Lory (2405.03133): each segment of a sequence has one FFN, the experts merged by the segment before.

Segment s goes through FFN(.; sum_e g_e theta_e) with g = softmax(R mean(h of segment s-1)); the first segment
uses its own mean, without gradient into it (section 3, causal segment routing). Segments of 256 tokens; the
last may be shorter than `segment` only where the whole sequence is.

Not causal as generation needs it: a route depends on 256 earlier tokens, and the first segment's on its own
later ones, which a held-out loss sees (the stop-gradient only keeps training from using it). The paper
generates with the gate of the prompt, another function than the one trained; here generation is refused. No
state, no loss. Merging costs E / segment experts for a token besides the one (section 3.2), and that is
counted.

The paper claims lower perplexity than a dense model of equal active size, and experts by domain; it batches
similar documents into one sequence, which is a matter of the data.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import ConfigError, divisors_text, number
from moejax.routers import parts, smear
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    segment: int = number(256, least=1)  # tokens that share merged experts


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`. Raises ConfigError if segments do not divide the sequences."""
    del state
    size = min(cfg.options.segment, tokens.seq_len)
    if tokens.seq_len % size:
        raise ConfigError(
            f"model.moe.router.segment={size} must divide sequences of {tokens.seq_len} tokens; "
            f"{divisors_text(tokens.seq_len)} would work"
        )
    own_GD, count_G = smear.mean_states(tokens, size)
    by_sequence = lambda a: a.reshape(-1, tokens.seq_len // size, *a.shape[1:])  # noqa: E731
    shift = lambda a: jnp.roll(by_sequence(a), 1, axis=1).reshape(a.shape)  # noqa: E731
    first_G = jnp.arange(count_G.shape[0]) % (tokens.seq_len // size) == 0
    # Also after a segment of padding alone, which has no mean.
    alone_G = first_G | (shift(count_G) == 0)
    states_GD = jnp.where(alone_G[:, None], jax.lax.stop_gradient(own_GD), shift(own_GD))
    return smear.merged(params, states_GD, count_G)


ROUTER = Router(
    options=Options(),
    source="Lory, 2405.03133",
    about=__doc__ or "",
    recipe=(("model.moe.experts_per_token", 1),),  # which nothing reads: a token costs one expert
    route=route,
    form="merge",
    causal=False,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    linear_losses=lambda cfg: True,
    experts_used=lambda cfg: 1.0 + cfg.num_experts / cfg.options.segment,
)

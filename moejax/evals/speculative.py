"""Speculative decoding with the model's own multi-token prediction (DeepSeek-V3, 2412.19437 section 2.2).

The first MTP depth reads (h_i, t_{i+1}) and guesses t_{i+2}. One forward pass of the trunk over the last
token and the guess then gives the true next token and, if the guess was right, the one after it. So each
pass gives one or two tokens, always those of greedy decoding (up to rounding: one pass over two tokens may
round differently from two passes over one). The next pass overwrites whatever a rejected guess left in the
caches (see `moejax.models.cache`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config import ComputeConfig, ConfigError, ModelConfig
from moejax.models import transformer
from moejax.models.blocks import Context, locate
from moejax.models.mtp import mtp_step


class Draft(NamedTuple):
    """Attributes:
    token_B: the guess for the token after the row's last one.
    cache: the MTP block's cache, one layer.
    """

    token_B: jax.Array
    cache: dict[str, jax.Array]


def check(cfg: ModelConfig, temperature: float) -> None:
    if cfg.mtp_depth < 1:
        raise ConfigError(
            f"speculative decoding needs a model with multi-token prediction; this one has "
            f"model.mtp_depth={cfg.mtp_depth}: train with mtp_depth=1, or leave out --speculative"
        )
    if temperature != 0:
        raise ConfigError(
            f"speculative decoding is greedy; temperature={temperature} must be 0, or leave out "
            "--speculative"
        )


def guess(
    params,
    router_state,
    trunk,
    next_BS,
    positions_BS,
    at_B,
    cache,
    cfg: ModelConfig,
    compute: ComputeConfig,
    *,
    mask_BS,
    **options,
) -> Draft:
    """Run the first MTP depth over some positions, and guess the token after one of them.

    Args:
      params: the model's, with `params["mtp"]`.
      router_state: of the whole model.
      trunk: the trunk's hidden states h_i, `Output.trunk`.
      next_BS: t_{i+1} for each of them.
      positions_BS: their positions i.
      at_B: the index in S after which to guess.
      cache: of the MTP block.
      cfg, compute: the model, and how it is computed.
      mask_BS: 1 = token, 0 = neither routed nor counted.
      **options: `prefill` and `layout`, as for `transformer.forward`.
    """
    first = lambda tree: jax.tree.map(lambda a: a[0], tree)  # noqa: E731
    where = locate(next_BS, cfg, positions_BS)
    ctx = Context(
        cfg=cfg, compute=compute, where=where, mask_BS=mask_BS, token_ids_BS=next_BS, **options
    )
    state = first(router_state.get("mtp", {}))
    _, normed_BSD, cache, *_ = mtp_step(
        params, first(params["mtp"]), 0, state, trunk, next_BS, ctx, cache=cache
    )
    last_BSD = jnp.take_along_axis(normed_BSD, at_B[:, None, None], axis=1)
    logits_BV = transformer.logits(params, last_BSD)[:, 0]
    assert cache is not None  # one went in
    return Draft(jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache)


def guess_round(
    params,
    router_state,
    token_B,
    position_B,
    active_B,
    cache,
    draft: Draft,
    cfg,
    compute,
    **options,
):
    """One forward pass over the last token and its guess.

    Returns:
      tokens_B2: the next token and the one after; accepted_B: whether the second is valid; the cache;
      the next draft.
    """
    tokens_B2 = jnp.stack([token_B, draft.token_B], axis=1)
    positions_B2 = position_B[:, None] + jnp.arange(2)[None]
    mask_B2 = jnp.broadcast_to(active_B[:, None], tokens_B2.shape)
    out = transformer.forward(
        params,
        router_state,
        tokens_B2,
        cfg,
        compute=compute,
        positions_BS=positions_B2,
        mask_BS=mask_B2,
        cache=cache,
        **options,
    )
    true_B2 = jnp.argmax(transformer.logits(params, out.hidden_BSD), axis=-1).astype(jnp.int32)
    accepted_B = true_B2[:, 0] == draft.token_B
    draft = guess(
        params,
        router_state,
        out.trunk,
        true_B2,
        positions_B2,
        accepted_B.astype(jnp.int32),
        draft.cache,
        cfg,
        compute,
        mask_BS=mask_B2,
        **options,
    )
    return true_B2, accepted_B, out.cache, draft

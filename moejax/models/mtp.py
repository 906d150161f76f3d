"""Multi-token prediction (DeepSeek-V3, 2412.19437 section 2.2): depth k predicts the token k+1 ahead.

Eq. 21-23: h^k_i = Block_k(M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h^{k-1}_i)]), with the trunk's embedding and
head. The paper writes the hidden state first; the released weights expect the embedding first, and so
do we. h^0 is the trunk after its final norm, as the released checkpoints are served.
"""

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import ModelConfig
from moejax.models import transformer
from moejax.models.norm import norm, norm_specs
from moejax.params import ParamSpec


def mtp_specs(cfg: ModelConfig) -> dict:
    """One depth's parameters; a block like the trunk's last."""
    d = cfg.d_model
    return {
        "embed_norm": norm_specs(d, cfg.norm, axes.EMBED),
        "hidden_norm": norm_specs(d, cfg.norm, axes.EMBED),
        "proj": ParamSpec((2 * d, d), (None, axes.EMBED), std=cfg.init_std),
        "block": transformer.block_specs(cfg, cfg.num_moe_layers > 0),
        "norm": norm_specs(d, cfg.norm, axes.EMBED),
    }


def shift(a_BS: jax.Array, by: int, fill: int = 0) -> jax.Array:
    """a[:, i] = a[:, i + by], `fill` past the end."""
    return jnp.pad(a_BS[:, by:], ((0, 0), (0, by)), constant_values=fill) if by else a_BS


def mtp_step(
    params: dict, depth_params: dict, depth, state, hidden_BSD, next_tokens_BS, cfg, where, **args
):
    """One depth: (hidden before its norm, normed hidden for the head, cache, aux).

    Args:
      params: the model's parameters (embedding).
      depth_params: this depth's parameters.
      depth: of this step, from 0.
      state: router state of this depth.
      hidden_BSD: h^{k-1}.
      next_tokens_BS: t_{i+k}.
      cfg: the model's config.
      where: positions and documents of the trunk's tokens.
      **args: as for `transformer.block`, with `load` the global loads of this depth.
    """
    load = args.pop("load", (None, None))
    e_BSD = transformer.embed(params, next_tokens_BS, where.positions_BS, cfg)
    both = jnp.concatenate(
        [
            norm(depth_params["embed_norm"], e_BSD, cfg.norm_eps),
            norm(depth_params["hidden_norm"], hidden_BSD, cfg.norm_eps),
        ],
        axis=-1,
    )
    x_BSD = jnp.dot(both, depth_params["proj"].astype(both.dtype))
    index = cfg.num_layers + depth
    layer = transformer.LayerInput(depth_params["block"], state, index, depth, None, load, None)
    x_BSD, cache, aux = transformer.block(x_BSD, layer, cfg, where, **args)
    return x_BSD, norm(depth_params["norm"], x_BSD, cfg.norm_eps), cache, aux


def mtp_targets(batch: dict, depth: int):
    """For depth k (1-based): (t_{i+k}, target t_{i+k+1}, loss mask), all BS; never across documents."""
    tokens = shift(batch["targets"], depth - 1)
    targets = shift(batch["targets"], depth)
    same = shift(batch["segment_ids"], depth) == batch["segment_ids"]
    return tokens, targets, shift(batch["loss_mask"], depth) * same


def mtp_forward(params, router_state, hidden_BSD, batch, cfg: ModelConfig, where, totals, **args):
    """All depths in training. Yields (hidden for the head, targets, mask, aux) for each depth."""

    def step(depth_params, depth, state, hidden_BSD, tokens, load):
        extra = {"totals": totals} if cfg.num_moe_layers else {}
        return mtp_step(
            *(params, depth_params, depth, state, hidden_BSD, tokens, cfg, where),
            load=load,
            **extra,
            **args,
        )

    if cfg.remat != "none":
        policy = transformer.REMAT_POLICIES[cfg.remat]
        step = jax.checkpoint(step, policy=policy, static_argnums=(1,))
    for k in range(cfg.mtp_depth):
        pick = lambda tree, k=k: jax.tree.map(lambda a: a[k], tree)  # noqa: E731
        tokens, targets, mask = mtp_targets(batch, k + 1)
        load = (None, None) if totals is None else pick((totals.load_E, totals.group_load_G))
        state = pick(router_state.get("mtp", {}))
        hidden_BSD, normed, _, aux = step(pick(params["mtp"]), k, state, hidden_BSD, tokens, load)
        yield normed, targets, mask, aux

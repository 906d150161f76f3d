"""AdamW with a decay mask, clipping and the schedules of the papers, from optax."""

import jax
import jax.numpy as jnp
import optax

from moejax.config import OptimizerConfig
from moejax.params import path_name


def schedule(cfg: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate as a function of the step.

    'multistep' is DeepSeekMoE's (2401.06066 section 4.1.3): linear warm-up, then x0.316 at 80% and again at
    90% of the steps. 'wsd' is warm-up, stable, linear decay.
    """
    peak, warmup = cfg.learning_rate, min(cfg.warmup_steps, steps)
    if cfg.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), cfg.min_lr_ratio)
    elif cfg.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif cfg.schedule == "wsd":
        start = max(int(cfg.decay_at[0] * steps) - warmup, 0)
        length = max(steps - warmup - start, 1)
        decay = optax.linear_schedule(peak, peak * cfg.min_lr_ratio, length)
        after = optax.join_schedules([optax.constant_schedule(peak), decay], [start])
    else:
        after = optax.piecewise_constant_schedule(
            peak, {max(int(f * steps) - warmup, 0): cfg.decay_factor for f in cfg.decay_at}
        )
    if not warmup:
        return after
    # Step 0 already learns: the ramp runs from peak/warmup to peak.
    ramp = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([ramp, after], [warmup])


STACKED = ("dense_blocks", "moe_blocks", "mtp")  # parameters with a leading axis of layers


def decay_mask(params) -> dict:
    """True where weight decay applies: matrices and embeddings, not vectors (norms, biases, sinks)."""

    def one(path, a):
        names = path_name(path).split("/")
        vector = a.ndim - (names[0] in STACKED) < 2
        return not (vector or names[-1].startswith("b_"))  # experts' biases are (E, F)

    return jax.tree_util.tree_map_with_path(one, params)


def make_optimizer(cfg: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        optax.adamw(
            schedule(cfg, steps),
            b1=cfg.b1,
            b2=cfg.b2,
            eps=cfg.eps,
            weight_decay=cfg.weight_decay,
            mask=decay_mask,
            mu_dtype=jnp.float32,
        ),
    )

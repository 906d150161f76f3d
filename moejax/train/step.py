"""One training step, pure: (state, batch) -> (state, metrics). The only place where gradients are taken."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from moejax import axes
from moejax.config import ExperimentConfig
from moejax.evals.validation import domain_sums
from moejax.models import transformer
from moejax.models.loss import LossParts, batch_totals, loss_fn
from moejax.moe import stats
from moejax.params import merge
from moejax.train.optimizer import bounded, optimizer_of, schedule, split_trained
from moejax.train.state import TrainState


def micro_batches(batch: dict, count: int, layout=None) -> dict:
    """[B, S, ..] -> [count, B/count, S, ..]; micro-batch i takes rows i, i+count, .. so that each stays spread
    over the same devices as the batch."""

    def one(a):
        a = a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1)
        return (
            a
            if layout is None
            else layout.constrain(a, None, axes.BATCH, axes.SEQ, *[None] * (a.ndim - 3))
        )

    return jax.tree.map(one, batch)


def counts_first(cfg: ExperimentConfig) -> bool:
    """Whether a loss multiplies counts over the whole batch by means, so the batch must be counted first."""
    router = cfg.model.router
    return router is not None and not router.linear_losses(cfg.model.router_config(cfg.objective))


def count_stats(loss_of, micro) -> dict:
    """The routers' stats (name -> stacked over layers), summed over all micro-batches in a forward pass without
    gradients. `loss_of` takes a micro-batch."""

    def count(part):
        return {n: a.stats for n, a in loss_of(part)[1].aux.items()}

    def one(carry, part):
        return jax.tree.map(jnp.add, carry, count(part)), None

    shapes = jax.eval_shape(count, jax.tree.map(lambda a: a[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(one, zeros, micro)[0]


def loss_and_grads(params, router_state, batch, cfg: ExperimentConfig, layout=None, key=None):
    """Loss, LossParts (summed over micro-batches) and gradients of one global batch. Gradients are only of the
    trained parameters (see `split_trained`).

    The result does not depend on `cfg.train.accumulation`: denominators are global, and losses that
    multiply counts with means get the counts of the whole batch from a first pass.
    """
    trained, frozen = split_trained(params, cfg)
    totals = batch_totals(batch, cfg.model)
    how = dict(objective=cfg.objective, compute=cfg.compute, layout=layout)

    def loss_of(trained, rows, key, totals):
        whole = merge(trained, frozen)
        return loss_fn(whole, router_state, rows, cfg.model, totals=totals, key=key, **how)

    n = cfg.train.accumulation
    if n == 1:
        grad_fn = jax.value_and_grad(loss_of, has_aux=True)
        (loss, parts), grads = grad_fn(trained, batch, key, totals)
        return loss, parts, grads
    micro = micro_batches(batch, n, layout), jnp.arange(n)

    def loss_of_part(trained, part, totals):
        rows, number = part
        here = None if key is None else jax.random.fold_in(key, number)
        return loss_of(trained, rows, here, totals)

    if counts_first(cfg):
        stats = count_stats(lambda part: loss_of_part(trained, part, totals), micro)
        totals = totals._replace(stats=stats)

    def one(grads, part):
        grad_fn = jax.value_and_grad(loss_of_part, has_aux=True)
        (loss, parts), g = grad_fn(trained, part, totals)
        return jax.tree.map(jnp.add, grads, g), (loss, parts)

    zeros = jax.tree.map(jnp.zeros_like, trained)
    grads, (losses, parts) = jax.lax.scan(one, zeros, micro)
    return losses.sum(), _join(parts, batch["tokens"].shape), grads


def _join(parts: LossParts, shape) -> LossParts:
    """Join the parts of micro-batches: add up sums, and put per-token arrays back in the rows of the batch."""
    nll_BS = parts.nll_BS.swapaxes(0, 1).reshape(shape)
    add_up = functools.partial(jax.tree.map, lambda a: a.sum(axis=0))
    total = add_up(parts._replace(nll_BS=None, aux=None))
    aux = {
        name: a._replace(
            losses=add_up(a.losses),
            stats=add_up(a.stats),
            routing=None,
            scores_TE=None,
            choice_TN=None,
            logits_TE=None,
        )
        for name, a in parts.aux.items()
    }
    return total._replace(nll_BS=nll_BS, aux=aux)


def train_step(
    state: TrainState,
    batch: dict,
    cfg: ExperimentConfig,
    *,
    num_domains: int = 1,
    layout=None,
    seed_key: jax.Array | None = None,
) -> tuple[TrainState, dict]:
    """One optimiser step.

    A step whose loss, gradient or result is not finite changes neither parameters, optimiser nor router state;
    it is counted in `skipped` and `bad_in_a_row`.

    Args:
      state: donated by `compile_step`.
      batch: the fields of DESIGN.md, int32.
      cfg: static.
      num_domains: length of the per-domain metrics.
      layout: None on one device.
      seed_key: the run's key; the step folds in `state.step`.

    Returns:
      The next state, and metrics: scalars, `stats/<blocks>/<stat>` and `state/<blocks>/<array>` of the routers
      with a leading axis of layers, `domain_nll` and `domain_targets`.
    """
    key = None if seed_key is None else jax.random.fold_in(seed_key, state.step)
    loss, parts, grads = loss_and_grads(state.params, state.router_state, batch, cfg, layout, key)
    grad_norm = optax.tree.norm(grads)
    trained, frozen = split_trained(state.params, cfg)
    with jax.named_scope("optimiser"):
        updates, opt_state = optimizer_of(cfg).update(grads, state.opt_state, trained)
        learned: Any = optax.apply_updates(trained, updates)
    seen = {name: a.stats for name, a in parts.aux.items()}
    router_state = transformer.update_router_state(
        state.router_state, seen, cfg.model, cfg.objective
    )

    # An update can overflow, or divide by zero, where loss and gradient do not. To look at all of one costs
    # another pass over parameters and moments.
    of_optimizer = () if bounded(cfg.optimizer) else (learned, opt_state)
    results = jax.tree.leaves((of_optimizer, router_state))
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(a).all() for a in results], finite)
    keep = functools.partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
    bad = (~finite).astype(jnp.int32)
    new_state = TrainState(
        step=state.step + 1,
        params=merge(keep(learned, trained), frozen),
        opt_state=keep(opt_state, state.opt_state),
        router_state=keep(router_state, state.router_state),
        skipped=state.skipped + bad,
        bad_in_a_row=jnp.where(finite, 0, state.bad_in_a_row + 1),
    )
    metrics = {
        "loss": loss,
        "cross_entropy": parts.cross_entropy,
        "grad_norm": grad_norm,
        # The optimiser does not count skipped steps.
        "learning_rate": schedule(cfg.optimizer, cfg.train.steps)(state.step - state.skipped),
        "tokens": (batch["segment_ids"] > 0).sum(),
        "skipped": new_state.skipped,
        "bad_in_a_row": new_state.bad_in_a_row,
        **{f"balance/{name}": value for name, value in parts.balance.items()},
        **{f"attention/{name}": value for name, value in parts.attention.items()},
        **domain_sums(parts.nll_BS, batch, num_domains),
    }
    if cfg.model.mtp_depth:
        metrics["mtp_loss"] = parts.mtp
    static = cfg.model.router_config()
    most = static.num_experts + (len(cfg.model.router.specials(static)) if cfg.model.router else 0)
    for kind, of in (("stats", seen), ("state", new_state.router_state)):
        for name, values in of.items():
            # Only numbers per layer, or per layer and expert; a table of the vocabulary is too large.
            small = {k: v for k, v in values.items() if v.ndim <= 2 and v[0].size <= most}
            metrics |= {f"{kind}/{name}/{k}": v for k, v in small.items()}
    if "moe_blocks" in seen:
        tokens = metrics["tokens"].astype(jnp.float32)
        metrics |= stats.summarize(seen["moe_blocks"], cfg.model.moe.num_experts, tokens)
    return new_state, metrics


def compile_step(
    cfg: ExperimentConfig, *, num_domains=1, layout=None, seed_key=None, shardings=None
):
    """Jit `train_step` and donate the state. With `shardings` (see `state_shardings`) the state keeps these,
    and the metrics are replicated on every device."""
    step = functools.partial(
        train_step, cfg=cfg, num_domains=num_domains, layout=layout, seed_key=seed_key
    )
    out = None if layout is None or shardings is None else (shardings, layout.replicated)
    return jax.jit(step, donate_argnums=0, out_shardings=out)

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
from moejax.models.loss import LossParts, StepTotals, batch_totals, loss_fn
from moejax.moe import stats
from moejax.moe.routers import ROUTERS
from moejax.params import merge
from moejax.train.optimizer import optimizer_of, schedule, split_trained
from moejax.train.state import TrainState


def micro_batches(batch: dict, count: int, layout=None) -> dict:
    """[B, S] -> [count, B/count, S]; micro-batch i takes rows i, i+count, .. so that each stays spread
    over the same devices as the batch."""

    def one(a):
        a = a.reshape(a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1)
        return a if layout is None else layout.constrain(a, None, axes.BATCH, axes.SEQ)

    return jax.tree.map(one, batch)


def needs_global_load(cfg: ExperimentConfig) -> bool:
    """Whether a loss multiplies a count over the whole batch with a mean over the micro-batch."""
    m = cfg.model.moe
    return bool(cfg.model.num_moe_layers) and not ROUTERS[m.router].linear_losses(m)


def count_loads(params, router_state, micro, cfg, totals, layout, key) -> dict:
    """Loads over all micro-batches: name -> (load_LE, group_load_LG). A forward pass, no gradient."""

    def loads(part):
        batch, number = part
        return _loads_of(params, router_state, batch, cfg, totals, layout, _fold(key, number))

    def one(carry, part):
        return jax.tree.map(jnp.add, carry, loads(part)), None

    shapes = jax.eval_shape(loads, jax.tree.map(lambda a: a[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(one, zeros, micro)[0]


def _fold(key, number):
    return None if key is None else jax.random.fold_in(key, number)


def _loads_of(params, router_state, batch, cfg, totals, layout, key):
    _, parts = loss_fn(
        params, router_state, batch, cfg.model, totals=totals, layout=layout, key=key
    )
    return {n: (a.load_E, a.group_load_G) for n, a in parts.aux.items()}


def loss_and_grads(params, router_state, batch, cfg: ExperimentConfig, layout=None, key=None):
    """Loss, LossParts (summed over micro-batches) and gradients of one global batch, the latter with respect
    to what is trained (see `split_trained`).

    The result does not depend on `cfg.train.accumulation`: denominators are global, and losses that
    multiply counts with means get the counts of the whole batch from a first pass.
    """
    trained, frozen = split_trained(params, cfg)

    def loss_of(trained, *args, **kwargs):
        return loss_fn(merge(trained, frozen), *args, **kwargs)

    grad_fn = jax.value_and_grad(loss_of, has_aux=True)
    totals = batch_totals(batch, cfg.model)
    n = cfg.train.accumulation
    if n == 1:
        (loss, parts), grads = grad_fn(
            trained, router_state, batch, cfg.model, totals=totals, layout=layout, key=key
        )
        return loss, parts, grads
    micro = micro_batches(batch, n, layout), jnp.arange(n)
    if needs_global_load(cfg):
        loads = count_loads(params, router_state, micro, cfg, totals, layout, key)
        totals = StepTotals(totals.targets, totals.mtp_targets, totals.tokens, loads)

    def one(grads, part):
        rows, number = part
        args = dict(totals=totals, layout=layout, key=_fold(key, number))
        (loss, parts), g = grad_fn(trained, router_state, rows, cfg.model, **args)
        return jax.tree.map(jnp.add, grads, g), (loss, parts)

    zeros = jax.tree.map(jnp.zeros_like, trained)
    grads, (losses, parts) = jax.lax.scan(one, zeros, micro)
    return losses.sum(), _join(parts, batch["tokens"].shape), grads


def _join(parts: LossParts, shape) -> LossParts:
    """Micro-batches' parts as the batch's: shares add up, per-token arrays go back to their rows."""
    nll_BS = parts.nll_BS.swapaxes(0, 1).reshape(shape)
    total = jax.tree.map(lambda a: a.sum(axis=0), parts._replace(nll_BS=None, aux=None))
    aux = {
        name: a._replace(
            losses=jax.tree.map(lambda x: x.sum(axis=0), a.losses),
            load_E=a.load_E.sum(axis=0),
            group_load_G=a.group_load_G.sum(axis=0),
            dropped=a.dropped.sum(axis=0),
            routing=None,
            score_entropy=a.score_entropy.sum(axis=0),
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

    A step whose loss or gradient is not finite changes neither parameters, optimiser nor router state;
    it is counted in `skipped` and `bad_in_a_row`.

    Args:
      state: donated by `compile_step`.
      batch: the fields of DESIGN.md, [B, S] int32.
      cfg: static.
      num_domains: length of the per-domain metrics.
      layout: None on one device.
      seed_key: the run's key; the step folds in `state.step`.

    Returns:
      The next state, and metrics: scalars, `load/<blocks>` [L, E], `domain_nll` and `domain_targets`.
    """
    key = None if seed_key is None else jax.random.fold_in(seed_key, state.step)
    loss, parts, grads = loss_and_grads(state.params, state.router_state, batch, cfg, layout, key)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    trained, frozen = split_trained(state.params, cfg)
    updates, opt_state = optimizer_of(cfg).update(grads, state.opt_state, trained)
    learned: Any = optax.apply_updates(trained, updates)
    loads = {name: a.load_E for name, a in parts.aux.items()}
    router_state = transformer.update_router_state(state.router_state, loads, cfg.model)

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
        # The optimiser does not count the steps that were left out.
        "learning_rate": schedule(cfg.optimizer, cfg.train.steps)(state.step - state.skipped),
        "tokens": (batch["segment_ids"] > 0).sum(),
        "skipped": new_state.skipped,
        "bad_in_a_row": new_state.bad_in_a_row,
        **{f"balance/{name}": value for name, value in parts.balance.items()},
        **domain_sums(parts.nll_BS, batch, num_domains),
    }
    if cfg.model.mtp_depth:
        metrics["mtp_loss"] = parts.mtp
    for name, a in parts.aux.items():
        metrics[f"load/{name}"] = a.load_E
    if "moe_blocks" in parts.aux:
        a = parts.aux["moe_blocks"]
        metrics |= stats.summarize(a.load_E, a.dropped)
        metrics["score_entropy"] = a.score_entropy.mean()
    return new_state, metrics


def compile_step(
    cfg: ExperimentConfig, *, num_domains=1, layout=None, seed_key=None, shardings=None
):
    """`train_step` jitted once, the state donated. `shardings` pins the state's (see `state_shardings`);
    the metrics are then whole on every device."""
    step = functools.partial(
        train_step, cfg=cfg, num_domains=num_domains, layout=layout, seed_key=seed_key
    )
    out = None if layout is None or shardings is None else (shardings, layout.replicated)
    return jax.jit(step, donate_argnums=0, out_shardings=out)

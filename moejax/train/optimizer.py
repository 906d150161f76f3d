"""The table of optimisers, how they treat each parameter's role and group, and the papers' schedules."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

from moejax.config import ExperimentConfig, OptimizerConfig
from moejax.models import transformer
from moejax.param_groups import Treatment, parse_rule
from moejax.params import ParamSpec, Tree, is_spec, map_specs, path_name, roles, select


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


# ---------------------------------------------------------------------------------------------------
# The optimisers: (options, learning rate, specs of what is trained, where decay applies) -> optax.
# `config_checks.READS` says which options each of them reads.


def _adamw(cfg: OptimizerConfig, rate: optax.Schedule, specs: Tree, decay: Tree):
    """AdamW (1711.05101)."""
    del specs
    return optax.adamw(
        rate,
        b1=cfg.b1,
        b2=cfg.b2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decay,
        mu_dtype=jnp.float32,
    )


def _muon(cfg: OptimizerConfig, rate: optax.Schedule, specs: Tree, decay: Tree):
    """Muon (Jordan 2024; 2502.16982) for the roles in `muon_roles`, AdamW for the rest.

    Each layer's and each expert's matrix is orthogonalised by itself. By default optax's muon takes all
    leaves with two axes, so stacked norms (L, D) and the embedding, but no stacked matrix.
    """
    coefficients = tuple(row[1:] for row in cfg.newton_schulz for _ in range(int(row[0])))
    same = len(cfg.newton_schulz) == 1  # optax then unrolls instead of scanning
    labels = map_specs(lambda s: "muon" if s.role in cfg.muon_roles else "adamw", specs)

    def dimensions(params):  # with masked nodes in place of AdamW's parameters
        return map_specs(_muon_dimensions, specs, params)

    orthogonal = muon(
        rate,
        ns_coeffs=coefficients[0] if same else coefficients,
        ns_steps=len(coefficients),
        beta=cfg.momentum,
        weight_decay=cfg.weight_decay,
        weight_decay_mask=decay,
        mu_dtype=jnp.float32,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=cfg.consistent_rms or None,
    )
    return optax.partition({"muon": orthogonal, "adamw": _adamw(cfg, rate, specs, decay)}, labels)


def _muon_dimensions(spec: ParamSpec, param) -> MuonDimensionNumbers | optax.MaskedNode:
    return param if isinstance(param, optax.MaskedNode) else MuonDimensionNumbers(*spec.matrix_dims)


def _lion(cfg: OptimizerConfig, rate: optax.Schedule, specs: Tree, decay: Tree):
    """Lion (2302.06675): the sign of a momentum; one moment."""
    del specs
    return optax.lion(
        rate, cfg.b1, cfg.b2, mu_dtype=jnp.float32, weight_decay=cfg.weight_decay, mask=decay
    )


def _adafactor(cfg: OptimizerConfig, rate: optax.Schedule, specs: Tree, decay: Tree):
    """Adafactor (1804.04235) without momentum, with an absolute learning rate like the others. It keeps a row
    and a column of second moments of each matrix of at least 128 x 128, and clips updates to an RMS of 1."""
    scale = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    return optax.chain(
        _each_instance(scale, specs),
        optax.add_decayed_weights(cfg.weight_decay, decay),
        optax.scale_by_learning_rate(rate),
    )


def _each_instance(
    inner: optax.GradientTransformation, specs: Tree
) -> optax.GradientTransformation:
    """Apply `inner` to the array of each layer and each expert separately. optax would factor a stack
    (L, E, D, F) over its two longest axes, whichever they are, and clip all experts together."""

    def mapped(f: Callable, spec: ParamSpec) -> Callable:
        for _ in range(spec.batch_dims):
            f = jax.vmap(f)
        return f

    def init(params):
        return map_specs(lambda s, p: mapped(inner.init, s)(p), specs, params)

    def update(updates, state, params=None):
        pairs = map_specs(
            lambda s, *args: mapped(inner.update, s)(*args), specs, updates, state, params
        )
        first, second = (map_specs(lambda _, p, i=i: p[i], specs, pairs) for i in (0, 1))
        return first, second

    return optax.GradientTransformation(init, update)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": _adamw,
    "muon": _muon,
    "adafactor": _adafactor,
    "lion": _lion,
}


# ---------------------------------------------------------------------------------------------------
# Of an experiment.


def make_optimizer(cfg: OptimizerConfig, specs: dict, steps: int) -> optax.GradientTransformation:
    """The optimiser for the trained part (see `split_trained`) of the parameters that `specs` describe. Raises
    ConfigError for a group that does not fit them."""
    treated = cfg.treatments(roles(specs))
    trained = select(specs, _trained(treated))

    def tree(f: Callable[[Treatment], object]) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: f(treated[path_name(path)]), trained, is_leaf=is_spec
        )

    parts = [
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        OPTIMIZERS[cfg.name](cfg, schedule(cfg, steps), trained, tree(lambda t: t.decay)),
    ]
    if any(t.lr != 1 for t in treated.values()):
        factors = tree(lambda t: t.lr)
        parts.append(optax.stateless(lambda updates, _: jax.tree.map(_times, factors, updates)))
    return optax.chain(*parts)


def bounded(cfg: OptimizerConfig) -> bool:
    """Whether an update by a finite gradient is finite, whatever the gradient: nobody need look at it.

    Clipped gradients are at most clip_norm, so moments stay below clip_norm and its square. AdamW's update is
    at most clip_norm / eps, Adafactor's has an RMS of 1 and Lion's is a sign. Muon's iterations may diverge
    with the coefficients given. Decay of at most the whole parameter makes nothing larger.
    """
    factors = [parse_rule(text).sets.get("lr", 1.0) for text in cfg.groups]
    rate = cfg.learning_rate * max([1.0, *factors])
    largest = rate * max(cfg.clip_norm / cfg.eps, 1.0)
    known = cfg.name != "muon" and cfg.clip_norm > 0
    return known and largest < 1e20 and rate * cfg.weight_decay <= 1


def _times(factor: float, a: jax.Array) -> jax.Array:
    return a if factor == 1 else factor * a


def optimizer_of(cfg: ExperimentConfig) -> optax.GradientTransformation:
    """`make_optimizer` for the experiment's model."""
    return make_optimizer(cfg.optimizer, transformer.param_specs(cfg.model), cfg.train.steps)


def split_trained(params: dict, cfg: ExperimentConfig) -> tuple[dict, dict]:
    """Split `params` into (trained, frozen); `params.merge` joins them again."""
    if not cfg.optimizer.groups:
        return params, {}
    treated = cfg.optimizer.treatments(roles(transformer.param_specs(cfg.model)))
    trained = _trained(treated)
    return select(params, trained), select(params, treated.keys() - trained)


def _trained(treated: dict[str, Treatment]) -> set[str]:
    return {path for path, t in treated.items() if not t.frozen}

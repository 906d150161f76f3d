"""The one table from logical axes to mesh axes, and the sizes of a mesh. Without jax: counting needs it, too.

Mesh axes: `data` (replicas), `fsdp` (batch and weights split over the same devices), `expert` (experts
split, and batch too), `tensor` (heads, FFN width and vocabulary split). The batch is split over the first
three. A config may replace rows of the table, e.g. `--config.mesh.rules="('expert=data',)"` lays the experts
over the devices that hold the batch.
"""

import math

from moejax import axes
from moejax.config import ConfigError, MeshConfig
from moejax.config_checks import divisors_text

# Logical axis -> mesh axes. Two dimensions of one array must not meet on one mesh axis.
RULES: dict[str, tuple[str, ...]] = {
    axes.LAYERS: (),
    axes.EMBED: (axes.FSDP,),
    axes.VOCAB: (axes.TENSOR,),
    axes.HEADS: (axes.TENSOR,),
    axes.KV_HEADS: (axes.TENSOR,),
    axes.LATENT: (),
    axes.MLP: (axes.TENSOR,),
    axes.EXPERT: (axes.EXPERT_AXIS,),
    axes.EXPERT_EMBED: (axes.FSDP,),
    axes.EXPERT_MLP: (axes.TENSOR,),
    axes.BATCH: (axes.DATA, axes.FSDP, axes.EXPERT_AXIS),
    axes.SEQ: (),
    axes.ACT_EMBED: (),
}


def parse_rules(overrides: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """RULES with the rows of MeshConfig.rules replaced; ConfigError names a bad row."""
    rules = dict(RULES)
    for row in overrides:
        logical, sep, target = row.partition("=")
        mesh_axes = tuple(a for a in target.split("+") if a)
        if not sep or logical not in RULES:
            raise ConfigError(
                f"mesh.rules: {row!r} is not 'logical=mesh[+mesh]'; logical axes: {', '.join(RULES)}"
            )
        for a in mesh_axes:
            if a not in axes.MESH_AXES:
                raise ConfigError(
                    f"mesh.rules: {row!r} names mesh axis {a!r}; known: {', '.join(axes.MESH_AXES)}"
                )
        rules[logical] = mesh_axes
    return rules


def mesh_sizes(cfg: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices along each mesh axis; an axis of -1 takes what is left of `num_devices`.

    Raises ConfigError if they do not match.
    """
    sizes = {a: getattr(cfg, a) for a in axes.MESH_AXES}
    fixed = math.prod(s for s in sizes.values() if s != -1)
    free = [a for a, s in sizes.items() if s == -1]
    text = ", ".join(f"{a}={s}" for a, s in sizes.items())
    if free:
        if num_devices % fixed:
            raise ConfigError(
                f"mesh ({text}): the fixed axes need a multiple of {fixed} devices, there are "
                f"{num_devices}; their product may be {divisors_text(num_devices)}"
            )
        sizes[free[0]] = num_devices // fixed
    elif fixed > num_devices:
        raise ConfigError(
            f"mesh ({text}) needs {fixed} devices, there are {num_devices}; "
            f"the product may be {divisors_text(num_devices)}, or set data=-1 to use what is left"
        )
    return sizes

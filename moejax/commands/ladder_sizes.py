"""Proposes the sizes of a ladder: an experiment made narrower and wider, trained compute-optimally.

A rung is a number of attention heads. Widths grow with it, and what is per head, per layer or per expert stays:
every rung is the same design. The baseline reads `ratio` tokens for each parameter that a token is multiplied
by (about 20: Hoffmann et al., 2203.15556). The variant trains on as many FLOPs as the baseline of its rung.
"""

import dataclasses
from fractions import Fraction
from typing import Any

from moejax.commands.sweep_file import Sweep
from moejax.config import ConfigError, ExperimentConfig
from moejax.cost.architecture import of_model
from moejax.cost.flops import flops_per_token
from moejax.cost.receipt import model_flops_per_token
from moejax.data.vocabulary import expected_tokens, with_vocabulary

# What grows with the number of heads; 0 means that a model does not have it.
WIDTHS = (
    *("model.d_model", "model.d_ff", "model.attention.num_heads", "model.attention.num_kv_heads"),
    *("model.attention.q_lora_rank", "model.attention.kv_lora_rank"),
    *("model.moe.d_expert", "model.moe.d_shared", "model.moe.latent_dim"),
)
WARMUP = 0.08  # of the steps, at most


@dataclasses.dataclass(frozen=True)
class Rung:
    """One size of one variant.

    Attributes:
      heads: what the rung is called by.
      variant: of the experiment file.
      overrides: of its config.
      compute: useful FLOPs of its training.
      tokens: that it reads.
    """

    heads: int
    variant: str
    overrides: dict[str, Any]
    compute: float
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.variant}-h{self.heads}"


def ladder(plan: Sweep, variants: list[str], heads: list[int], ratio: float) -> list[Rung]:
    """The rungs, smallest first, `variants[0]` (the baseline) first in each.

    Raises ConfigError for a number of heads to which some width does not scale, and where the command line sets
    the steps.
    """
    given = _given(plan)
    if "train.steps" in given:
        raise ConfigError(
            f"{given['train.steps']}: a ladder sets the steps of each size; use --ratio"
        )
    out = []
    for number in sorted(heads):
        compute = None
        for variant in variants:
            cfg = plan.experiment(variant, plan.seeds[0])
            widths = scaled(cfg, number, variant)
            wide = _sized(plan, variant, widths)
            per_token = model_flops_per_token(wide)
            if compute is None:
                compute = per_token * ratio * multiplied(wide)
            in_batch = wide.data.batch_size * wide.data.seq_len
            steps = max(1, round(compute / per_token / in_batch))
            times = {
                "train.steps": steps,
                "train.eval_every": steps,
                "optimizer.warmup_steps": max(
                    1, min(cfg.optimizer.warmup_steps, int(WARMUP * steps))
                ),
            }
            times = {k: v for k, v in times.items() if k not in given}
            tokens = steps * in_batch
            out.append(Rung(number, variant, {**widths, **times}, per_token * tokens, tokens))
    return out


def scaled(cfg: ExperimentConfig, heads: int, variant: str) -> dict[str, int]:
    """The widths of a config as overrides, for another number of heads."""
    factor, out = Fraction(heads, cfg.model.attention.num_heads), {}
    for key in WIDTHS:
        value: Any = cfg
        for part in key.split("."):
            value = getattr(value, part)
        if not value:
            continue
        new = value * factor
        if new.denominator > 1 or new < 1:
            near = [
                h for h in range(1, 4 * heads) if (value * h) % cfg.model.attention.num_heads == 0
            ]
            raise ConfigError(
                f"{variant}: with {heads} heads {key}={value} would be {float(new):g}, no whole number; "
                f"--heads={','.join(map(str, near[:4]))} would work"
            )
        out[key] = int(new)
    return out


def multiplied(cfg: ExperimentConfig) -> float:
    """Parameters that a token is multiplied by, the head among them and the embedding not."""
    return flops_per_token(of_model(cfg.model), "forward", cfg.data.seq_len).matmul / 2


def as_sweep(plan: Sweep, rungs: list[Rung]) -> Sweep:
    """The sweep that trains them. Widths of the command line are in those of the rungs, scaled."""
    variants = {}
    for rung in rungs:
        argument, overrides = plan.variants[rung.variant]
        variants[rung.name] = argument, {**overrides, **rung.overrides}
    scaled_ones = {key for rung in rungs for key in rung.overrides}
    common = tuple(text for key, text in _given(plan).items() if key not in scaled_ones)
    return dataclasses.replace(plan, variants=variants, baseline=rungs[0].name, common=common)


def _given(plan: Sweep) -> dict[str, str]:
    """The overrides of the command line by key."""
    return {text.removeprefix("--config.").partition("=")[0]: text for text in plan.common}


def _sized(plan: Sweep, variant: str, widths: dict[str, int]) -> ExperimentConfig:
    """The config with these widths, and the vocabulary that it will have."""
    one = as_sweep(plan, [Rung(0, variant, dict(widths), 0.0, 0)])
    cfg = one.experiment(one.baseline, plan.seeds[0])
    return with_vocabulary(cfg, expected_tokens(cfg.data))

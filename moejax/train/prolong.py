"""Going on with another schedule: said, and refused unless asked for, where the learning rate would jump."""

import pathlib

import numpy as np

from moejax.config import ConfigError, ExperimentConfig
from moejax.config_io import from_stored
from moejax.runs.restore import newest_meta
from moejax.train.optimizer import schedule

# A rate given with six digits is the same rate.
RELATIVE = 1e-4


def check_schedule(workdir: pathlib.Path, cfg: ExperimentConfig) -> None:
    """ConfigError if the run in `workdir`, if any, would go on with a learning rate other than the one that its
    schedule so far says for the next step. A cosine, say, stretches over train.steps.

    `train.rate_may_jump` allows it.
    """
    found = newest_meta(workdir)
    if found is None or found[1]["data"] is None or cfg.train.rate_may_jump:
        return
    step, meta = found
    if step >= cfg.train.steps:
        return  # nothing left to train
    before = from_stored(meta["config"])
    was, now = (float(schedule(c.optimizer, c.train.steps)(step)) for c in (before, cfg))
    if np.isclose(was, now, rtol=RELATIVE, atol=0.0):
        return
    steps = f"train.steps={before.train.steps} there, {cfg.train.steps} now"
    ways = [
        "--config.train.rate_may_jump=true takes the jump",
        "another --workdir trains all steps on the new schedule",
    ]
    if was > 0:
        keep = f"--config.optimizer.schedule=constant --config.optimizer.learning_rate={was:.6g}"
        ways.insert(0, f"{keep} goes on without a jump")
    raise ConfigError(
        f"{workdir}: the learning rate would jump from {was:.6g} to {now:.6g} at step {step}, because the "
        f"schedule is another one ({before.optimizer.schedule} there, {cfg.optimizer.schedule} now; {steps}). "
        "What works:\n" + "\n".join(f"  - {way}" for way in ways)
    )

"""What do fixed slots for each expert cost, beside routes that are all computed?

    moejax sweep --config=experiments/capacity.py --workdir=runs/capacity --jobs=2

`slots-F`: each expert has F times its fair share of slots in a batch, and what finds none is dropped
(GShard, 2006.16668; Switch, 2101.03961). `dropless` drops nothing, in training and evaluation alike.

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

                loss    beside dropless            dropped
    dropless    4.5619                             0
    slots-1.0   4.5660  +0.004 (-0.093 .. +0.101)  21% of the routes
    slots-1.25  4.5570  -0.005 (-0.058 .. +0.048)  13%
    slots-2.0   4.5524  -0.010 (-0.116 .. +0.097)   6%

Dropped is the mean of `drop_fraction` in metrics.jsonl. Nothing shows, although a fifth of the routes is
dropped; the shared expert and the residual are still there. On a CPU slots are no faster, either. A run takes
60 to 80 s on one core.
"""

from small import get_config as get_config


def get_sweep():
    slots = {f"slots-{f}": {"objective.capacity_factor": f} for f in (1.0, 1.25, 2.0)}
    return {"variants": {"dropless": {}, **slots}, "seeds": (0, 1, 2, 3, 4)}

"""What do fixed slots for each expert cost, beside routes that are all computed?

    moejax sweep --config=experiments/capacity.py --workdir=runs/capacity --jobs=2

`slots-F`: each expert has F times its fair share of slots in a batch, and what finds none is dropped
(GShard, 2006.16668; Switch, 2101.03961). `dropless` drops nothing, in training and evaluation alike.

Not run yet.
"""

from small import get_config as get_config


def get_sweep():
    slots = {f"slots-{f}": {"objective.capacity_factor": f} for f in (1.0, 1.25, 2.0)}
    return {"variants": {"dropless": {}, **slots}, "seeds": (0, 1, 2, 3, 4)}

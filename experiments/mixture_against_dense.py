"""Is a mixture better than a dense model, at the same compute for each token, and in the same time?

    moejax sweep --config=experiments/mixture_against_dense.py --workdir=runs/mixture_against_dense --jobs=2

`dense` has the mixture's active parameters. `dense-longer` trains as long as the mixture does on this
machine.

Not run yet.
"""

from small import get_config as get_config


def get_sweep():
    return {
        "variants": {
            "dense": {"variant": "dense"},
            "dense-longer": {"variant": "dense", "train.steps": 450},
            "moe": {},
        },
        "seeds": (0, 1, 2, 3, 4),
    }

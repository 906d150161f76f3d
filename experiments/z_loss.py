"""Does the router's z-loss help a model that computes in bfloat16?

    moejax sweep --config=experiments/z_loss.py --workdir=runs/z_loss --jobs=2

The router computes in float32 in any case (2101.03961 section 2.4). ST-MoE (2202.08906 section 3.3) adds
the mean square of the logarithm of the sum of its exponentials, at 0.001, for stability in bfloat16.

Not run yet.
"""

from small import get_config as get_config


def get_sweep():
    bf16 = {"compute.dtype": "bfloat16"}
    return {
        "variants": {
            "float32": {},
            "bfloat16": bf16,
            **{f"bfloat16-z-{z}": bf16 | {"objective.z_loss": z} for z in (0.001, 0.01)},
        },
        "seeds": (0, 1, 2),
        "baseline": "bfloat16",
    }

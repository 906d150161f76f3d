"""Does a router need float32, and does the z-loss help one that reads bfloat16?

    moejax sweep --config=experiments/router_precision.py --workdir=runs/router_precision --jobs=2

Switch (2101.03961 section 2.4) computes the router alone in float32: "selective precision". ST-MoE (2202.08906
section 3.3) adds the mean square of the logarithm of the sum of its exponentials, at 0.001: small logits have
small errors. Here all else computes in float32, so that the router alone is coarse
(`compute.router_dtype`).

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

                loss    beside float32             MaxVio
    float32     4.5619                             0.50
    float32-z   4.5753  +0.013 (-0.031 .. +0.058)  0.78
    bfloat16    4.5695  +0.008 (-0.034 .. +0.049)  0.55
    bfloat16-z  4.5634  +0.002 (-0.095 .. +0.097)  0.76

Nothing shows in 300 steps of a small model: a coarse router is 0.008 behind, less than a tenth of what seeds
differ, and the z-loss neither helps it nor a fine one. It makes the balance a little worse. A run takes 60 to
75 s on one core.
"""

from small import get_config as get_config


def get_sweep():
    z = {"objective.z_loss": 0.001}
    coarse = {"compute.router_dtype": "bfloat16"}
    return {
        "variants": {
            "float32": {},
            "float32-z": z,
            "bfloat16": coarse,
            "bfloat16-z": coarse | z,
        },
        "seeds": (0, 1, 2, 3, 4),
    }

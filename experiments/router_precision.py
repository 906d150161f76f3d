"""Does a router need float32, and does the z-loss help one that reads bfloat16?

    moejax sweep --config=experiments/router_precision.py --workdir=runs/router_precision --jobs=2

Switch (2101.03961 section 2.4) computes the router alone in float32: "selective precision". ST-MoE (2202.08906
section 3.3) adds the mean square of the logarithm of the sum of its exponentials, at 0.001: small logits have
small errors. Here all else computes in float32, so that the router alone is coarse
(`compute.router_dtype`).

Not run yet.
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

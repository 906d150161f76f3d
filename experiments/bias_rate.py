"""How fast should the selection bias move?

    moejax sweep --config=experiments/bias_rate.py --workdir=runs/bias_rate --jobs=2

V3's rate is 0.001 a step, for runs a thousand times as long (2412.19437 section 4.2). `still` has no rule.

Not run yet.
"""

from small import get_config as get_config


def get_sweep():
    still = {"objective.bias_update": "none", "objective.bias_rate": 0.001}
    return {
        "variants": {
            **{f"rate-{u}": {"objective.bias_rate": u} for u in (0.01, 0.1, 0.001, 0.0001)},
            "still": still,
        },
        "seeds": (0, 1, 2, 3, 4),
    }

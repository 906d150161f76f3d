"""How fast should the selection bias move?

    moejax sweep --config=experiments/bias_rate.py --workdir=runs/bias_rate --jobs=2

V3's rate is 0.001 a step, for runs a thousand times as long (2412.19437 section 4.2). `still` has no rule.

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

                 loss    beside rate-0.01           MaxVio  idle experts
    rate-0.01    4.5619                              0.50     0
    rate-0.1     4.6578  +0.096 (-0.086 .. +0.277)   1.76     0.2
    rate-0.001   4.5659  +0.004 (-0.040 .. +0.048)   1.35     0
    rate-0.0001  4.5745  +0.013 (-0.017 .. +0.042)   4.73     2
    still        4.5645  +0.003 (-0.022 .. +0.027)   4.69     2.5

The rate decides the balance, and the loss hardly notices: only 0.1, which overshoots, is worse with every
seed, by 0.05 to 0.18. V3's 0.001 is too slow for 300 steps and balances less than half as well. A run takes
60 to 76 s on one core.
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

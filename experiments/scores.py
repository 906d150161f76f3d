"""Softmax, sigmoid or the root of softplus, and should the weights of a token add up to 1?

    moejax sweep --config=experiments/scores.py --workdir=runs/scores --jobs=2

Softmax is V1's and V2's score, sigmoid V3's, sqrt-softplus V4's. `-sum1` divides the chosen scores by their
sum. All are balanced by a bias on the scores, which moves by 0.01 a step.

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

                        loss    beside sigmoid-sum1        MaxVio
    sigmoid-sum1        4.5619                             0.50
    sigmoid             4.5974  +0.035 (-0.124 .. +0.195)  0.62
    softmax-sum1        4.6272  +0.065 (-0.054 .. +0.184)  1.58
    softmax             4.6019  +0.040 (-0.064 .. +0.144)  2.37
    sqrt_softplus-sum1  4.5485  -0.013 (-0.091 .. +0.064)  0.52
    sqrt_softplus       4.5697  +0.008 (-0.113 .. +0.129)  0.65

Softmax is behind, with a sum of 1 with every seed; seven seeds would tell it. It is also the one that the
bias balances worst: one step of 0.01 is a third of a mean softmax score, 1/32, so the bias overshoots.
Sigmoid and the root of softplus do not differ, and a sum of 1 is better for both by 0.02 to 0.04, which is
within the noise. A run takes 60 to 75 s on one core.
"""

from small import get_config as get_config


def get_sweep():
    return {
        "variants": {
            score + ("-sum1" if sums else ""): {
                "model.moe.router.score": score,
                "model.moe.router.normalize_weights": sums,
            }
            for score in ("sigmoid", "softmax", "sqrt_softplus")
            for sums in (True, False)
        },
        "seeds": (0, 1, 2, 3, 4),
    }

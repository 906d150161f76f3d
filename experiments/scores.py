"""Softmax, sigmoid or the root of softplus, and should the weights of a token add up to 1?

    moejax sweep --config=experiments/scores.py --workdir=runs/scores --jobs=2

Softmax is V1's and V2's score, sigmoid V3's, sqrt-softplus V4's. `-sum1` divides the chosen scores by their
sum. All are balanced by a bias on the scores, which moves by 0.01 a step.

Not run yet.
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

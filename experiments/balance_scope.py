"""Over how much text should a balance loss ask for balance: a sequence, or the whole batch?

    moejax sweep --config=experiments/balance_scope.py --workdir=runs/balance_scope --jobs=2

`sequence-A` and `batch-A`: the same product of counts and mean scores, times A, over 128 tokens or over
2,048. Nothing else balances. 2501.11873 finds that balance over a larger scope costs less and lets experts
specialise.

Result, seeds 0 to 2, held-out loss (interval of batch minus sequence: Student's t, 95%, paired by seed):

          sequence  MaxVio  batch   MaxVio  difference
    0.01  4.5666    0.784   4.5471  0.795   -0.020 (-0.115 .. +0.076)
    0.1   4.5322    0.401   4.5129  0.498   -0.019 (-0.131 .. +0.092)

The whole batch is better by 0.02 at both strengths, and worse with one seed of three at both: the sign of
2501.11873, and no more than the noise. By the same seeds, 0.1 is better than 0.01. It would take 30 to 50
seeds to show 0.02. A run takes 80 s on one core.
"""

from balance import NO_BIAS
from small import get_config as get_config


def get_sweep():
    return {
        "variants": {
            f"{scope}-{a}": NO_BIAS | {f"objective.{key}": a}
            for a in (0.01, 0.1)
            for scope, key in (("sequence", "sequence_loss"), ("batch", "expert_loss"))
        },
        "seeds": (0, 1, 2, 3, 4),
    }

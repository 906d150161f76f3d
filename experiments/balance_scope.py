"""Over how much text should a balance loss ask for balance: a sequence, or the whole batch?

    moejax sweep --config=experiments/balance_scope.py --workdir=runs/balance_scope --jobs=2

`sequence-A` and `batch-A`: the same product of counts and mean scores, times A, over 128 tokens or over
2,048. Nothing else balances. 2501.11873 finds that balance over a larger scope costs less and lets experts
specialise.

Not run yet.
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

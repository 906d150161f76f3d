"""Are many small experts better than a few large ones, at the same parameters and compute?

    moejax sweep --config=experiments/granularity.py --workdir=runs/granularity --jobs=2

`pieces-G`: each of 8 experts of 256 hidden units, one of which a token uses, is cut into G pieces, and a
token uses G of 8 G (DeepSeekMoE, 2401.06066 section 3.1).

Not run yet.
"""

from small import TOKEN
from small import get_config as get_config


def get_sweep():
    return {
        "variants": {
            f"pieces-{g}": {
                "model.moe.num_experts": 8 * g,
                "model.moe.experts_per_token": g,
                "model.moe.d_expert": TOKEN // g,
            }
            for g in (1, 2, 4, 8, 16)
        },
        "seeds": (0, 1, 2, 3, 4),
    }

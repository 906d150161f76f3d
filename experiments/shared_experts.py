"""How many of a token's experts should be shared, at the same parameters and compute?

    moejax sweep --config=experiments/shared_experts.py --workdir=runs/shared_experts --jobs=2

Of 33 experts of 64 hidden units a token uses 5: `shared-N` are the same for all tokens, the others are
routed (DeepSeekMoE, 2401.06066 section 3.2).

Not run yet.
"""

from small import EXPERTS, PER_TOKEN, WIDTH
from small import get_config as get_config


def get_sweep():
    return {
        "variants": {
            f"shared-{n}": {
                "model.moe.shared_experts": n,
                "model.moe.d_shared": n * WIDTH,
                "model.moe.num_experts": EXPERTS + 1 - n,
                "model.moe.experts_per_token": PER_TOKEN + 1 - n,
                # One weight divided by itself would be 1, and tell the router nothing.
                "model.moe.router.normalize_weights": n < PER_TOKEN,
            }
            for n in (0, 1, 2, 4)
        },
        "seeds": (0, 1, 2, 3, 4),
    }

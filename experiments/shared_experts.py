"""How many of a token's experts should be shared, at the same parameters and compute?

    moejax sweep --config=experiments/shared_experts.py --workdir=runs/shared_experts --jobs=2

Of 33 experts of 64 hidden units a token uses 5: `shared-N` are the same for all tokens, the others are
routed (DeepSeekMoE, 2401.06066 section 3.2).

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

              loss    beside shared-0            MaxVio
    shared-0  4.5857                             0.48
    shared-1  4.5619  -0.024 (-0.159 .. +0.111)  0.50
    shared-2  4.5520  -0.034 (-0.127 .. +0.059)  0.64
    shared-4  4.5827  -0.003 (-0.112 .. +0.106)  1.12

It does not show: one or two are better with two seeds of three, by less than half of what seeds differ. With
normalised weights `shared-4`, whose one routed expert has then always the weight 1, ended at 4.686, worse
than none with every seed. A run takes 60 to 71 s on one core.
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

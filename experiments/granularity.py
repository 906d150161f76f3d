"""Are many small experts better than a few large ones, at the same parameters and compute?

    moejax sweep --config=experiments/granularity.py --workdir=runs/granularity --jobs=2

`pieces-G`: each of 8 experts of 256 hidden units, one of which a token uses, is cut into G pieces, and a
token uses G of 8 G (DeepSeekMoE, 2401.06066 section 3.1).

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

               loss    beside pieces-1
    pieces-1   4.6139
    pieces-2   4.5724  -0.042 (-0.132 .. +0.049)
    pieces-4   4.5619  -0.052 (-0.149 .. +0.045)
    pieces-8   4.5819  -0.032 (-0.121 .. +0.057)
    pieces-16  4.5502  -0.064 (-0.087 .. -0.040)

Cut experts are better than whole ones with every seed; how finely they are cut does not show: 2 to 16 pieces
lie within 0.03, and only 16 are told from whole ones by three seeds. Twelve would tell the others. With one
expert a token, `normalize_weights=True` would make every weight 1, and the router learn from the balance alone.
A run takes 75 to 120 s on one core.
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
                # One weight divided by itself would be 1, and tell the router nothing.
                "model.moe.router.normalize_weights": g > 1,
            }
            for g in (1, 2, 4, 8, 16)
        },
        "seeds": (0, 1, 2, 3, 4),
    }

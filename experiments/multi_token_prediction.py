"""Does predicting the token after the next one, too, make the next one easier?

    moejax sweep --config=experiments/multi_token_prediction.py --workdir=runs/multi_token_prediction --jobs=2

`weight-W`: one more layer predicts a token further (2412.19437 section 2.2), its loss weighs W. The
held-out loss is of the next token alone. V3's weight is 0.3, later 0.1.

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

                loss    beside without
    without     4.5619
    weight-0.1  4.5236  -0.038 (-0.137 .. +0.060)
    weight-0.3  4.4334  -0.128 (-0.358 .. +0.101)

Better: with the weight of 0.3 with every seed, by 0.03 to 0.21, with 0.1 with two of three. But a step costs
1.57 times the FLOPs, and three seeds leave zero inside both intervals; seven would tell 0.3. A run takes 90 s
on one core.
"""

from small import get_config as get_config


def get_sweep():
    return {
        "variants": {
            "without": {},
            **{
                f"weight-{w}": {"model.mtp_depth": 1, "objective.mtp_loss_weight": w}
                for w in (0.1, 0.3)
            },
        },
        "seeds": (0, 1, 2, 3, 4),
    }

"""Does predicting the token after the next one, too, make the next one easier?

    moejax sweep --config=experiments/multi_token_prediction.py --workdir=runs/multi_token_prediction --jobs=2

`weight-W`: one more layer predicts a token further (2412.19437 section 2.2), its loss weighs W. The
held-out loss is of the next token alone. V3's weight is 0.3, later 0.1.

Not run yet.
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

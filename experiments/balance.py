"""What does balance cost, and which way of balancing costs least?

    moejax sweep --config=experiments/balance.py --workdir=runs/balance --jobs=2

- `none`: nothing balances.
- `loss`: DeepSeekMoE's expert-level loss (2401.06066 eq. 12), its counts pooled over the batch, at 0.01.
- `sequence`: V3's loss of each sequence (2412.19437 eq. 17), as strong.
- `bias`: a selection bias moved by the sign of the load's error, no loss (2408.15664).
- `quantile`: a bias solved for from quantiles of the scores (kexue.fm 11619).

2408.15664 has MaxVio falling from 0.72 with a loss to 0.04 with the bias, and a lower loss, for a model of
1B.

Not run yet.
"""

from small import get_config as get_config

NO_BIAS = {
    "model.moe.router.expert_bias": False,
    "objective.bias_update": "none",
    "objective.bias_rate": 0.001,  # the default, which means nothing without a rule
    "objective.sequence_loss": 0.0,
}


def get_sweep():
    return {
        "variants": {
            "none": NO_BIAS,
            "loss": NO_BIAS | {"objective.expert_loss": 0.01},
            "sequence": NO_BIAS | {"objective.sequence_loss": 0.01},
            "bias": {"objective.sequence_loss": 0.0},
            "quantile": {
                "model.moe.router.name": "quantile",
                **{k: v for k, v in NO_BIAS.items() if not k.startswith("model.")},
            },
        },
        "seeds": (0, 1, 2, 3, 4),
    }

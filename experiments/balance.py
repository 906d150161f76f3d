"""What does balance cost, and which way of balancing costs least?

    moejax sweep --config=experiments/balance.py --workdir=runs/balance --jobs=2

- `none`: nothing balances.
- `loss`: DeepSeekMoE's expert-level loss (2401.06066 eq. 12), its counts pooled over the batch, at 0.01.
- `sequence`: V3's loss of each sequence (2412.19437 eq. 17), as strong.
- `bias`: a selection bias moved by the sign of the load's error, no loss (2408.15664).
- `quantile`: a bias solved for from quantiles of the scores (kexue.fm 11619).

2408.15664 has MaxVio falling from 0.72 with a loss to 0.04 with the bias, and a lower loss, for a model of
1B.

Result, seeds 0 to 2, held-out loss beside `none` paired by seed (interval: Student's t, 95%):

              loss   MaxVio  experts without tokens  difference
    none      4.5495  5.572  6.2 of 32
    loss      4.5471  0.795  0                       -0.003 (-0.057 .. +0.053)
    sequence  4.5666  0.784  0                       +0.017 (-0.025 .. +0.059)
    bias      4.5496  0.531  0                       +0.000 (-0.044 .. +0.044)
    quantile  4.5723  0.456  0                       +0.023 (-0.133 .. +0.179)

Balance costs nothing that three seeds show, and gives nothing either: a fifth of the experts is idle
without it, at the same loss. The order by MaxVio is the paper's; 0.04 is far, with steps of 0.01 over 300
steps. A difference of 0.05 that seeds agree on would change our mind. A run takes 80 s on one core.
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

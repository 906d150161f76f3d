"""Is Muon better than AdamW for a mixture, for each step and for each second?

    moejax sweep --config=experiments/muon.py --workdir=runs/muon --jobs=2

Muon takes the matrices, of every expert by itself; AdamW takes embeddings, head, norms and routers. With
`consistent_rms=0.2` (2502.16982) its updates are as large as AdamW's, so both have the same learning rates
to choose from.

Not run yet.
"""

from small import get_config as get_config


def get_sweep():
    muon = {"optimizer.name": "muon", "optimizer.consistent_rms": 0.2}
    return {
        "variants": {
            **{f"adamw-{r}": {"optimizer.learning_rate": r} for r in (0.002, 0.004)},
            "adamw-longer": {"train.steps": 375},
            **{f"muon-{r}": muon | {"optimizer.learning_rate": r} for r in (0.002, 0.004)},
        },
        "seeds": (0, 1, 2),
    }

"""Is Muon better than AdamW for a mixture, for each step and for each second?

    moejax sweep --config=experiments/muon.py --workdir=runs/muon --jobs=2

Muon takes the matrices, of every expert by itself; AdamW takes embeddings, head, norms and routers. With
`consistent_rms=0.2` (2502.16982) its updates are as large as AdamW's, so both have the same learning rates
to choose from.

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

                  loss    by seed                 beside adamw-0.002
    adamw-0.002   4.5619  4.6661  4.4052  4.6143
    adamw-0.004   4.6509  4.6622  4.6096  4.6809  +0.089 (-0.174 .. +0.352)
    adamw-longer  4.3136  4.4137  4.1610  4.3661  -0.248 (-0.258 .. -0.238)
    muon-0.002    4.1327  4.1390  4.1094  4.1498  -0.429 (-0.726 .. -0.132)
    muon-0.004    3.9637  3.9869  3.9279  3.9762  -0.598 (-0.863 .. -0.333)

Yes, for each step and for each second, with every seed. A step of Muon took 1.2 to 1.25 times as long as one
of AdamW beside it (80 to 84 s, 67 s); `adamw-longer` has that time, and is 0.35 behind. Muon's seeds differ
least, and its higher rate is the better one, so neither rate is its best yet. It is the largest effect of
these questions.

A profile puts Muon's update at a quarter of a step on two cores: `moejax train --config=experiments/small.py
--workdir=runs/profile --config.train.steps=40 --profile=30:33 --config.optimizer.name=muon
--config.optimizer.consistent_rms=0.2`.
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

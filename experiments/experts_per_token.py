"""How many experts should a token use: at the same compute, and with the same parameters?

    moejax sweep --config=experiments/experts_per_token.py --workdir=runs/experts_per_token --jobs=2

- `flops-K`: 32 experts; those of a token have 256 hidden units together, so fewer are wider, and all of
  them more.
- `memory-K`: 32 experts of 64 hidden units, so more are more compute.

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

              loss    beside flops-4             FLOPs  parameters
    flops-1   4.6917  +0.130 (-0.092 .. +0.351)  1      7.194M
    flops-2   4.5837  +0.022 (-0.158 .. +0.201)  1      4.048M
    flops-4   4.5619                             1      2.475M
    flops-8   4.5729  +0.011 (-0.031 .. +0.053)  1      1.689M
    memory-1  4.6662  +0.104 (-0.227 .. +0.436)  0.83   2.475M
    memory-2  4.6187  +0.057 (-0.174 .. +0.288)  0.89   2.475M
    memory-8  4.5558  -0.006 (-0.029 .. +0.017)  1.22   2.475M

One expert a token is worst in both series, at equal compute with every seed, although those 32 experts have
three times the parameters. Two, four and eight are not told apart: with the same parameters the loss falls
with every expert more, from 4.67 to 4.56, but less each time. A run takes 60 to 90 s on one core.
"""

from small import PER_TOKEN, TOKEN
from small import get_config as get_config

MANY = (1, 2, 4, 8)


def used(k: int) -> dict:
    """K experts a token. One weight divided by itself would be 1, and tell the router nothing."""
    return {"model.moe.experts_per_token": k, "model.moe.router.normalize_weights": k > 1}


def get_sweep():
    flops = {f"flops-{k}": {**used(k), "model.moe.d_expert": TOKEN // k} for k in MANY}
    memory = {f"memory-{k}": used(k) for k in MANY if k != PER_TOKEN}
    return {
        "variants": {**flops, **memory},
        "seeds": (0, 1, 2),
        "baseline": f"flops-{PER_TOKEN}",
    }

"""How many experts should a token use: at the same compute, and with the same parameters?

    moejax sweep --config=experiments/experts_per_token.py --workdir=runs/experts_per_token --jobs=2

- `flops-K`: 32 experts; those of a token have 256 hidden units together, so fewer are wider, and all of
  them more.
- `memory-K`: 32 experts of 64 hidden units, so more are more compute.

Not run yet.
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

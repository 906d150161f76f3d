"""Is a mixture made of a trained dense model better than one from scratch, at equal added compute?

    moejax train --config=experiments/upcycling.py:base --workdir=runs/upcycling-base
    moejax sweep --config=experiments/upcycling.py --workdir=runs/upcycling --jobs=2

The base is dense, and has read 614,400 tokens. `dense` goes on with it. `upcycled` makes 8 experts of each
FFN of the second and third layer, copies at first, two of them for each token (2212.05055); `scratch` is
the same mixture from fresh parameters. A token of the mixture takes more FLOPs, so both train fewer steps.

Result, seeds 0 to 2, added compute 3.23 TFLOPs each (interval of the difference: Student's t, 95%, paired):

              steps  held-out loss  beside dense
    dense       300  4.0220
    upcycled    234  4.1158         +0.094 (+0.039 .. +0.149)
    scratch     234  4.8800         +0.858 (+0.749 .. +0.967)

Better than from scratch, which has no base to build on; but going on with the dense model is better still, with
every seed. The mixture begins where the base ended (4.6766) and has read 22% fewer tokens when its
compute is spent: while the loss falls this fast, tokens are worth more than experts. A base trained until its
loss is flat would change our mind. A run takes 70 to 110 s on one core.
"""

import dataclasses

from small import SMALL, TOKEN, WIDTH

from moejax.config import ConfigError, MoEConfig, ObjectiveConfig
from moejax.config_io import to_config_dict
from moejax.routers import router_options

BASE = "runs/upcycling-base"
STEPS, STEPS_OF_MIXTURE = 300, 234  # moejax plan: 5.26M and 6.75M FLOPs for a token of training


def get_config(variant: str = "upcycled"):
    if variant not in ("base", "dense", "upcycled", "scratch"):
        raise ConfigError(
            f"upcycling.py:{variant} is unknown; variants: base, dense, upcycled, scratch"
        )
    experts = MoEConfig(
        num_experts=8,
        experts_per_token=2,
        d_expert=TOKEN + WIDTH,
        router=router_options(score="softmax", normalize_weights=True),
    )
    mixture = variant in ("upcycled", "scratch")
    return to_config_dict(
        dataclasses.replace(
            SMALL,
            name=f"upcycling-{variant}",
            model=dataclasses.replace(SMALL.model, moe=experts if mixture else MoEConfig()),
            objective=ObjectiveConfig(expert_loss=0.01) if mixture else ObjectiveConfig(),
            train=dataclasses.replace(
                SMALL.train,
                steps=STEPS_OF_MIXTURE if mixture else STEPS,
                eval_every=STEPS,
                checkpoint_every=STEPS,
                init_from=BASE if variant in ("dense", "upcycled") else "",
                upcycle=variant == "upcycled",
            ),
        )
    )


def get_sweep():
    return {
        "variants": {v: {"variant": v} for v in ("dense", "upcycled", "scratch")},
        "seeds": (0, 1, 2),
    }

"""Should the first layers be dense?

    moejax sweep --config=experiments/first_layer.py --workdir=runs/first_layer --jobs=2

`dense-N`: the first N of three layers have an FFN as wide as what a token of a mixture uses. So compute
stays, and fewer dense layers mean more parameters. DeepSeek's first layer is dense because its experts
balanced slowest (2401.06066 section 4.1.2).

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

             loss    beside dense-1             parameters
    dense-1  4.5619                             2.475M
    dense-0  4.5728  +0.011 (-0.303 .. +0.325)  3.167M
    dense-2  4.5454  -0.016 (-0.270 .. +0.237)  1.783M

Nothing shows: the seeds disagree about both signs, and 300 would have to be run. So one layer of experts,
with 28% fewer parameters, does as well here as two. A run takes 55 to 64 s on one core.
"""

from small import get_config as get_config


def get_sweep():
    return {
        "variants": {f"dense-{n}": {"model.num_dense_layers": n} for n in (1, 0, 2)},
        "seeds": (0, 1, 2, 3, 4),
    }

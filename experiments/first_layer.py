"""Should the first layers be dense?

    moejax sweep --config=experiments/first_layer.py --workdir=runs/first_layer --jobs=2

`dense-N`: the first N of three layers have an FFN as wide as what a token of a mixture uses. So compute
stays, and fewer dense layers mean more parameters. DeepSeek's first layer is dense because its experts
balanced slowest (2401.06066 section 4.1.2).

Not run yet.
"""

from small import get_config as get_config


def get_sweep():
    return {
        "variants": {f"dense-{n}": {"model.num_dense_layers": n} for n in (1, 0, 2)},
        "seeds": (0, 1, 2, 3, 4),
    }

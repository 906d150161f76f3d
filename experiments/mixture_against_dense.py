"""Is a mixture better than a dense model, at the same compute for each token, and in the same time?

    moejax sweep --config=experiments/mixture_against_dense.py --workdir=runs/mixture_against_dense --jobs=2

`dense` has the mixture's active parameters. `dense-longer` trains as long as the mixture does: its steps
took 61 s on one core, the mixture's 60, those of `dense` 54.

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

                  loss    by seed                 beside dense
    dense         4.6569  4.6766  4.6190  4.6750
    dense-longer  4.5176  4.5457  4.4767  4.5302  -0.139 (-0.158 .. -0.121)
    moe           4.5619  4.6661  4.4052  4.6143  -0.095 (-0.358 .. +0.168)

At equal compute the mixture wins with every seed, by 0.01 to 0.21; at equal time the dense model wins with
two seeds of three. The mixture's seeds differ four times as much as the dense model's, so three settle neither:
by what they show it takes twelve at equal compute, and some forty at equal time.

At three sizes, 0.2 to 5.1 TFLOPs, a mixture is worth 1.01 to 1.09 times the compute and 0.76 to 0.88 times the
time (`moejax ladder --config=experiments/mixture_against_dense.py --workdir=runs/ladder
--variants=dense,moe --heads=1,2,3 --ratio=3 --seeds=0,1 --jobs=2`).
"""

from small import get_config as get_config


def get_sweep():
    return {
        "variants": {
            "dense": {"variant": "dense"},
            "dense-longer": {"variant": "dense", "train.steps": 340},
            "moe": {},
        },
        "seeds": (0, 1, 2, 3, 4),
    }

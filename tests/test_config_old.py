"""Configs of moejax 0.1.0 mean today what they meant: any that it accepted is accepted, with its values."""

import json
import random

import pytest

from moejax.config import ConfigError, ExperimentConfig
from moejax.config_io import from_stored, to_json
from moejax.config_old import moved, renewed
from moejax.routers import router_options

# Of 0.1.0's keys in `model` and `model.moe` those that are elsewhere today: their values, defaults first.
MODEL = {
    "mtp_loss_weight": (0.3, 0.1), "dtype": ("float32", "bfloat16", "float64"), "scan_layers": (True, False),
    "remat": ("none", "full", "dots"), "loss_chunk": (0, 7),
}  # fmt: skip
MOE = {
    "router": ("token_choice", "expert_choice"), "score": ("softmax", "sigmoid", "sqrt_softplus"),
    "normalize_weights": (False, True), "routed_scaling": (1.0, 2.5), "router_bias": (False, True),
    "num_groups": (1, 2, 4), "topk_groups": (1, 2, 0, 9), "group_score": ("max", "top2_sum"),
    "bias_update": ("none", "sign", "sign_centered", "proportional", "frozen"), "bias_rate": (0.001, 0.1),
    "expert_loss": (0.0, 0.1), "sequence_loss": (0.0, 0.1), "device_loss": (0.0, 0.1),
    "communication_loss": (0.0, 0.1), "z_loss": (0.0, 0.1), "balance_groups": (1, 2, 4),
    "dispatcher": ("dropless", "dense", "capacity"), "capacity_factor": (1.25, 0.5),
    "grouped_matmul": ("auto", "reference", "blocked", "ragged", "tokamax"),
    "expert_parallel": ("ring", "all_to_all"), "buffer_factor": (0.0, 1.5),
}  # fmt: skip
LOSSES = ("expert_loss", "sequence_loss", "device_loss", "communication_loss")


def accepted(model: dict, moe: dict) -> bool:
    """0.1.0's checks of these keys, for 8 experts of which a token uses 2."""
    groups, kept, devices = moe["num_groups"], moe["topk_groups"], moe["balance_groups"]
    if groups > 1 and not (1 <= kept <= groups and kept * 8 // groups >= 2):
        return False
    if (moe["device_loss"] or moe["communication_loss"]) and devices == 1:
        return False
    if moe["communication_loss"] and groups not in (1, devices):
        return False
    if moe["router"] == "token_choice":
        return True
    unread = ("score", "normalize_weights", "num_groups", "bias_update", *LOSSES)
    return moe["dispatcher"] != "dropless" and all(moe[k] == MOE[k][0] for k in unread)


def draw(rng: random.Random) -> tuple[dict, dict]:
    while True:
        rare = rng.random()
        model, moe = (
            {k: rng.choice(v) if rng.random() < rare else v[0] for k, v in keys.items()}
            for keys in (MODEL, MOE)
        )
        moe["dispatcher"] = rng.choice(MOE["dispatcher"])
        if accepted(model, moe):
            return model, moe


def check_meaning(cfg: ExperimentConfig, model: dict, moe: dict) -> None:
    """That a config of today is what these keys were in 0.1.0."""
    o, c, r = cfg.objective, cfg.compute, cfg.model.moe.router
    slots, capacity = moe["router"] == "expert_choice", moe["dispatcher"] == "capacity"
    # What the router computes.
    assert r.name == moe["router"]
    assert (r.routed_scaling, r.router_bias) == (moe["routed_scaling"], moe["router_bias"])
    if slots:
        assert r.capacity_factor == moe["capacity_factor"]
    else:
        for key in ("score", "normalize_weights", "num_groups", "topk_groups", "group_score"):
            assert getattr(r, key) == moe[key]
        assert r.expert_bias == (moe["bias_update"] != "none")
    # What it is trained for: a frozen bias is there, and no rule moves it.
    assert o.bias_update == ("none" if moe["bias_update"] == "frozen" else moe["bias_update"])
    for key in (*LOSSES, "z_loss", "balance_groups", "bias_rate"):
        assert getattr(o, key) == moe[key]
    assert o.mtp_loss_weight == model["mtp_loss_weight"]
    # Routes were dropped in training, and only by token choice's capacity.
    assert o.capacity_factor == (moe["capacity_factor"] if capacity and not slots else 0)
    # How it is computed.
    for key in ("dtype", "scan_layers", "remat", "loss_chunk"):
        assert getattr(c, key) == model[key]
    assert c.dispatcher == ("dense" if moe["dispatcher"] == "dense" else "auto")
    if not slots:
        kernel = moe["grouped_matmul"]
        assert c.grouped_matmul == ("auto" if kernel == "blocked" else kernel)
        assert (c.expert_parallel, c.buffer_factor) == (
            moe["expert_parallel"],
            moe["buffer_factor"],
        )


def stored(model: dict, moe: dict, num_experts: int = 8) -> dict:
    moe = {"num_experts": num_experts, "experts_per_token": 2, "d_expert": 4, **moe}
    return {"name": "old", "model": {"d_model": 32, **model, "moe": moe}, "data": {"seed": 3}}


def others(values: dict, keys: dict) -> dict:
    """Without the defaults."""
    return {k: v for k, v in values.items() if v != keys[k][0]}


@pytest.mark.parametrize("seed", range(5))
def test_whatever_was_accepted_means_the_same(seed):
    rng = random.Random(seed)
    for _ in range(100):
        model, moe = draw(rng)
        values = stored(model, moe)
        text = json.dumps(values)
        cfg = from_stored(values)
        assert json.dumps(values) == text  # nobody else's values are changed
        check_meaning(cfg, model, moe)
        assert (cfg.name, cfg.model.d_model, cfg.data.seed, cfg.train.seed) == ("old", 32, 3, 0)
        assert from_stored(json.loads(to_json(cfg))) == cfg
        # A missing key meant its default.
        assert from_stored(stored(others(model, MODEL), others(moe, MOE))) == cfg
        # A dense model could have any of these, read by nobody.
        model, moe = ({k: rng.choice(v) for k, v in keys.items()} for keys in (MODEL, MOE))
        dense = from_stored(stored(model, moe, num_experts=0))
        assert dense.model.router is None and dense.model.d_model == 32


def test_defaults_are_the_defaults():
    model, moe = ({k: v[0] for k, v in keys.items()} for keys in (MODEL, MOE))
    cfg = from_stored({"model": {**model, "moe": moe}, "data": {}})
    assert cfg == ExperimentConfig() == from_stored({"model": {"moe": {}}, "data": {}})
    assert from_stored({"model": {}, "data": {}}) == ExperimentConfig()


@pytest.mark.parametrize(
    "moe, text",
    [
        ({"router": "expert"}, "model.moe.router.name='expert': did you mean 'expert_choice'?"),
        ({"dispatcher": "sparse"}, "compute.dispatcher='sparse': choices are auto, dense"),
        ({"bias_update": "up"}, "objective.bias_update='up': choices are none, sign, "),
        ({"grouped_matmul": "fast"}, "compute.grouped_matmul='fast': did you mean 'auto'? choices are auto, "),
        ({"capacity_factor": "1", "dispatcher": "capacity"},
         "objective.capacity_factor must be a float, not '1'"),
        ({"num_groups": 3}, "must be a multiple of model.moe.router.num_groups=3"),
        ({"slope": 3}, "unknown key model.moe.slope; "),
        ({"router": "expert_choice", "bias_update": "sign"}, "objective.bias_update='sign' is not read by"),
    ],
)  # fmt: skip
def test_what_was_refused_is_refused(moe, text):
    with pytest.raises(ConfigError) as e:
        from_stored(stored({}, moe))
    assert text in str(e.value).splitlines()[1] and len(str(e.value).splitlines()) == 2


@pytest.mark.parametrize(
    "values",
    [
        {"model": 3, "data": {}}, {"model": {"moe": 3}, "data": {}}, {"model": {"moe": {"router": 3}}},
        {"model": {"dtype": "float32"}, "objective": {}}, {"model": {"moe": {"router": {"name": "x"}}}},
        {"model": {"moe": {"router": "token_choice"}}, "compute": {}},
    ],
)  # fmt: skip
def test_what_is_not_of_0_1_0_is_left_as_it_is(values):
    assert renewed(values) is values
    with pytest.raises(ConfigError, match="1 problem"):
        from_stored(values)


@pytest.mark.parametrize(
    "key, value, today",
    [
        ("model.dtype", "bfloat16", {"compute.dtype": "bfloat16"}),
        ("model.moe.z_loss", "1", {"objective.z_loss": "1"}),
        ("model.moe.score", "sigmoid", {"model.moe.router.score": "sigmoid"}),
        ("model.moe.router", "expert_choice", {"model.moe.router.name": "expert_choice"}),
        ("model.moe.dispatcher", "capacity", {"objective.capacity_factor": 1.25}),
        ("model.moe.bias_update", "frozen",
         {"model.moe.router.expert_bias": True, "objective.bias_update": "none"}),
        ("model.moe.num_experts", "3", {}), ("model.moe.zzz", "3", {}), ("model.moe", "3", {}),
        ("model", "3", {}), ("train.steps", "3", {}), ("moe.score", "sigmoid", {}),
    ],
)  # fmt: skip
def test_where_a_key_is_today(key, value, today):
    assert moved(key, value) == today


def test_every_key_that_moved_is_found():
    for group, keys in (("model", MODEL), ("model.moe", MOE)):
        for key, values in keys.items():
            if (
                key != "capacity_factor"
            ):  # read by a router or a dispatcher, which the key alone does not say
                assert moved(f"{group}.{key}", values[-1]), key
    assert router_options("expert_choice").capacity_factor == MOE["capacity_factor"][0]

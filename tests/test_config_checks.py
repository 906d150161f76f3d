"""What must fit together in a config: said once, with the keys, their values and what would work."""

import dataclasses
import json
import sys

import pytest
from config_case import BIAS, DEVICES, EXPERT_CHOICE, GROUPS, MLA, MOE, full, nested, problems
from flat import change, put

from moejax.attention import ATTENTIONS
from moejax.config import ConfigError, ExperimentConfig, MoEConfig
from moejax.config_checks import model_problems, training_doubts
from moejax.config_io import (
    from_config_dict,
    from_stored,
    to_json,
    with_router,
)
from moejax.options import number
from moejax.routers import ROUTERS, router_options
from moejax.routers.contract import Router, RouterOptions

NAMES = ", ".join(ROUTERS)

# What must fit together.


@pytest.mark.parametrize(
    "base, key, value, text",
    [
        ({}, "num_dense_layers", -1, "=-1 must be between 0 and model.num_layers=4"),
        ({}, "num_dense_layers", 5, "=5 must be between 0 and model.num_layers=4"),
        (MOE, "num_dense_layers", 4, "=4 leaves no layer for the model.moe.num_experts=8 experts"),
        ({}, "d_ff", 0, "=0 must be positive: there are dense layers"),
        ({}, "attention.num_kv_heads", 0, "attention.num_kv_heads=0; 1, 2 or 4 would work"),
        ({}, "attention.num_kv_heads", 3, "num_heads=4 must be a multiple of model.attention.num_kv_heads=3"),
        ({}, "attention.head_dim", 7, "=7 must be positive, and even for rotary"),
        ({}, "attention.head_dim", 0, "=0 must be positive"),
        ({"positions": "learned"}, "attention.head_dim", 0, "=0 must be positive"),
        (MLA, "attention.kv_lora_rank", 0, "=0 must be positive for 'mla'"),
        (MLA, "attention.qk_nope_head_dim", 0, "=0 must be positive for 'mla'"),
        (MLA, "attention.qk_rope_head_dim", 0, "=0 must be positive for 'mla'"),
        (MLA, "attention.v_head_dim", 0, "=0 must be positive for 'mla'"),
        (MLA, "attention.qk_rope_head_dim", 3, "=3 must be even"),
        (MLA, "positions", "learned", "='learned': 'mla' needs 'rope'"),
        (MLA, "attention.sinks", True, " is not available with 'mla'"),
        ({}, "attention.windows", (128, -1), "=(128, -1) must not be negative"),
        ({}, "attention.rope.yarn_beta_slow", 33, "=33.0 must be at most model.attention.rope.yarn_beta_fast"),
        ({}, "activation", "swiglu_clamped", "='swiglu_clamped' needs model.moe.activation_limit > 0"),
        (MOE, "moe.activation", "swiglu_oai", "='swiglu_oai' needs model.moe.activation_limit > 0"),
        (MOE, "moe.experts_per_token", 9, "=9 must be between 1 and model.moe.num_experts=8"),
        (MOE, "moe.experts_per_token", 0, "=0 must be between 1 and model.moe.num_experts=8"),
        (MOE, "moe.d_expert", 0, "=0 must be positive"),
        (MOE, "moe.router.num_groups", 3, "must be a multiple of model.moe.router.num_groups=3; 1, 2, 4 or 8"),
        (GROUPS, "moe.router.topk_groups", 0, "=0 must be between 1 and model.moe.router.num_groups=4"),
        (GROUPS, "moe.router.topk_groups", 5, "=5 must be between 1 and model.moe.router.num_groups=4"),
        (GROUPS, "moe.experts_per_token", 6, "fewer than model.moe.experts_per_token=6; topk_groups >= 3"),
        ({**GROUPS, "moe.router.topk_groups": 1}, "moe.experts_per_token", 3,
         "1 groups of 2 experts hold fewer"),
        ({**GROUPS, "moe.router.num_groups": 8}, "moe.router.group_score", "top2_sum",
         "needs groups of at least 2 experts"),
        (MOE, "objective.balance_groups", 3, "must be a multiple of objective.balance_groups=3; 1, 2, 4 or 8"),
        (MOE, "objective.device_loss", 0.1, "=0.1 needs objective.balance_groups > 1"),
        (MOE, "objective.communication_loss", 0.1, "=0.1 needs objective.balance_groups > 1"),
        ({**GROUPS, "objective.balance_groups": 2}, "objective.communication_loss", 0.1,
         "balance_groups=2 must equal model.moe.router.num_groups=4"),
        (MOE, "objective.bias_update", "sign", "='sign' moves a selection bias that the router does not have: "
         "set model.moe.router.expert_bias=True, or objective.bias_update='none'"),
        (MOE, "moe.router.name", "expert",
         "='expert': did you mean 'expert_choice'? choices are " + NAMES),
        (MOE, "moe.router.name", 3, "=3: choices are " + NAMES),
        (MOE, "moe.router", "expert_choice",
         f" must be a group of options with a name: {NAMES}, not 'expert_choice'"),
        ({}, "data.seq_len", 4097, "=4097 is longer than model.max_seq_len=4096"),
        ({}, "data.sources", (), " is empty: ('builtin',) would work"),
        ({}, "data.weights", (1, 2), " has 2 entries for 1 data.sources"),
        ({}, "data.weights", (0,), "=(0.0,) must not be negative and must not sum to zero"),
        ({"data.sources": ("builtin", "a=b")}, "data.weights", (2, -1), "=(2.0, -1.0) must not be negative"),
        ({}, "optimizer.decay_at", (0.8, 1.1), "=(0.8, 1.1) must be fractions of the run, in (0, 1]"),
        ({}, "optimizer.decay_at", (0, 0.9), "=(0.0, 0.9) must be fractions of the run, in (0, 1]"),
        ({"optimizer.schedule": "wsd"}, "optimizer.decay_at", (), "=() must be fractions"),
        ({}, "train.accumulation", 3, "data.batch_size=16 must be a multiple of train.accumulation=3; 1, 2"),
        ({}, "mesh.fsdp", 0, "mesh sizes must be positive, at most one of them -1; got data=-1, fsdp=0"),
        ({}, "mesh.tensor", -1, "got data=-1, fsdp=1, expert=1, tensor=-1"),
        ({}, "mesh.expert", -2, "got data=-1, fsdp=1, expert=-2, tensor=1"),
        ({}, "mesh.data", 0, "got data=0, fsdp=1, expert=1, tensor=1"),
    ],
)  # fmt: skip
def test_values_that_cannot_work(base, key, value, text):
    """Each is said once, and is all that is wrong."""
    (line,) = problems({**base, key: value})
    assert (full(key) if text[0] in "= " else "") + text in line


def test_what_is_unused_may_be_anything():
    assert not problems({**MLA, "attention.num_kv_heads": 3, "attention.head_dim": 7})
    assert not problems({"positions": "learned", "attention.head_dim": 7})
    assert not problems({**MOE, "num_dense_layers": 0, "d_ff": 0, "activation": "swiglu_oai"})
    assert not problems({"moe.activation": "swiglu_oai", "moe.experts_per_token": 0})
    assert not problems({"optimizer.decay_at": (), "optimizer.clip_norm": 0})
    assert not problems({"mesh.data": 2, "mesh.tensor": -1})
    # Without experts, nothing is asked of their router and their balance.
    assert not problems({"moe.router.num_groups": 3, "moe.router.topk_groups": 9})
    assert not problems({"objective.bias_update": "sign", "objective.device_loss": 0.1})
    assert not problems(
        {"moe.router.name": "expert_choice", "compute.expert_parallel": "all_to_all"}
    )


def test_limits_themselves_are_allowed():
    assert not problems({**MOE, "moe.experts_per_token": 8, "data.seq_len": 4096})
    assert not problems({**MOE, "moe.experts_per_token": 1, "num_dense_layers": 3})
    assert not problems(
        {**GROUPS, "moe.router.topk_groups": 4, "moe.router.group_score": "top2_sum"}
    )
    assert not problems({**GROUPS, "moe.router.topk_groups": 1})
    assert not problems({**GROUPS, "moe.router.num_groups": 8})
    assert not problems({**DEVICES, "objective.device_loss": 1, "objective.communication_loss": 1})
    assert not problems(
        {**GROUPS, "objective.balance_groups": 4, "objective.communication_loss": 0.1}
    )
    assert not problems({**EXPERT_CHOICE, "compute.dispatcher": "dense"})
    assert not problems({"attention.rope.yarn_beta_slow": 32, "optimizer.decay_at": (1,)})
    assert not problems({"data.sources": ("builtin", "a=b"), "data.weights": (1, 0)})
    assert not problems({"optimizer.schedule": "wsd", "norm_eps": sys.float_info.max})


def test_all_problems_are_reported_at_once():
    lines = problems(
        {**MOE, "moe.experts_per_token": 9, "d_model": 0, "train.steps": 0, "norm": 0.5}
    )
    assert lines == ["model.norm must be a str, not 0.5"]  # values come after types
    lines = problems(
        {"norm": 0.5, "train.stepz": 1, "data": 3, "moe.router.scor": 1, "compute.remat": 1}
    )
    assert len(lines) == 5
    lines = problems({
        **MOE, "moe.experts_per_token": 9, "d_model": 0, "norm": "a", "objective.z_loss": -1,
        "compute.remat": "a", "data.seed": -1, "optimizer.eps": 0, "train.steps": 0, "mesh.data": 0,
    })  # fmt: skip
    assert [line.split("=")[0] for line in lines] == [
        "model.d_model", "model.norm", "model.moe.experts_per_token", "objective.z_loss", "compute.remat",
        "data.seed", "optimizer.eps", "train.steps",
        "mesh sizes must be positive, at most one of them -1; got data",
    ]  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Routers.


# Routers with options of their own, and with the defaults of these.
FIRST = {n: r for n, r in ROUTERS.items() if r.options == type(r.options)()}
OPTIONS = {f.name: f.default for r in ROUTERS.values() for f in dataclasses.fields(r.options)}


@pytest.mark.parametrize("name", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "name"])
def test_options_of_another_router(name, option):
    owners = [n for n, r in FIRST.items() if hasattr(r.options, option)]
    key = f"model.moe.router.{option}"
    refused = (
        f"{key} is an option of the router {' and '.join(owners)}: "
        f"choose it by model.moe.router.name={owners[0]}"
    )
    lines = problems({**MOE, "moe.router.name": name, key: OPTIONS[option]})
    assert lines == ([] if name in owners else [refused])


def test_a_router_has_no_option_that_none_has():
    (line,) = problems({**EXPERT_CHOICE, "moe.router.capacity": 2})
    assert line == (
        "unknown key model.moe.router.capacity; did you mean model.moe.router.capacity_factor?"
    )


SET = {"bias_update": "sign", "balance_groups": 2}  # instead of 0.1
OF_ATTENTION = frozenset().union(*(kind.objectives for kind in ATTENTIONS.values()))
BALANCE = [
    f.name for f in dataclasses.fields(ExperimentConfig().objective) if f.name not in OF_ATTENTION
]


@pytest.mark.parametrize("name", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("field", BALANCE)
def test_balance_that_a_router_does_not_read(name, field):
    value = SET.get(field, 0.1)
    base = {**DEVICES, "moe.router.name": name} | (BIAS if name == "token_choice" else {})
    read = {
        "token_choice": BALANCE,
        "expert_choice": ["z_loss", "bias_rate", "balance_groups", "mtp_loss_weight"],
    }[name]
    default = getattr(ExperimentConfig().objective, field)
    refused = [
        f"objective.{field}={value!r} is not read by model.moe.router.name={name!r}: "
        f"leave it at {default!r}"
    ]
    assert problems({**base, f"objective.{field}": value}) == ([] if field in read else refused)


@pytest.mark.parametrize(
    "key, value, default",
    [("grouped_matmul", "ragged", "'auto'"), ("expert_parallel", "all_to_all", "'ring'"),
     ("buffer_factor", 2.0, "0.0")],
)  # fmt: skip
def test_slots_are_not_sent_row_by_row(key, value, default):
    assert problems({**EXPERT_CHOICE, f"compute.{key}": value}) == [
        f"compute.{key}={value!r} is about routes of tokens, and the router 'expert_choice' makes none "
        f"(its form is 'slot'): leave it at {default}"
    ]
    assert not problems({**MOE, f"compute.{key}": value})
    free = {"compute.dtype": "bfloat16", "compute.remat": "full", "compute.scan_layers": False}
    assert not problems({**EXPERT_CHOICE, **free, "compute.loss_chunk": 9})


def test_a_router_of_ones_own_is_checked_like_the_others(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Options(RouterOptions):
        slope: float = number(1.0, above=0)

    def refuse(cfg, prefix):
        return [f"{prefix}router.slope does not fit"] * (cfg.options.slope == 3)

    def specials(cfg):
        assert cfg.options.slope != 3  # asked of options that fit only
        return ("zero",)

    router = Router(
        Options(), lambda *a: None, "token", True, balance=("z_loss",), problems=refuse, specials=specials
    )  # fmt: skip
    monkeypatch.setitem(ROUTERS, "own", router)
    own = {**MOE, "moe.router.name": "own"}
    assert not problems({**own, "moe.router.slope": 2, "objective.z_loss": 1})
    assert problems({**own, "moe.router.slope": 0}) == [
        "model.moe.router.slope=0.0 must be above 0"
    ]
    assert problems({**own, "moe.router.slope": 3}) == ["model.moe.router.slope does not fit"]
    (line,) = problems({**own, "objective.expert_loss": 1})
    assert line.startswith("objective.expert_loss=1.0 is not read by model.moe.router.name='own'")
    cfg = from_config_dict(nested({**own, "moe.router.slope": 2}))
    assert from_stored(json.loads(to_json(cfg))) == cfg and cfg.model.moe.router.slope == 2.0
    wrong = dataclasses.replace(router, specials=lambda cfg: ("zeroo",))
    monkeypatch.setitem(ROUTERS, "own", wrong)
    (line,) = problems(own)
    assert line.startswith("a special expert of 'own'='zeroo': did you mean 'zero'?")


def test_a_router_that_learns_nothing_from_the_text():
    cfg = change(ExperimentConfig(), num_experts=8, d_expert=8, normalize_weights=True)
    assert training_doubts(cfg) == []
    one = put(cfg, "model.moe.experts_per_token", 1)
    (line,) = training_doubts(one)
    assert "always 1" in line and "normalize_weights=False would teach it" in line
    assert training_doubts(change(one, normalize_weights=False)) == []
    assert training_doubts(put(one, "model.moe.num_experts", 1)) == []  # nothing to learn
    assert training_doubts(with_router(one, "soft_moe")) == []
    assert training_doubts(ExperimentConfig()) == []  # dense


def test_options_without_a_router():
    cfg = put(ExperimentConfig(), "model.moe", MoEConfig(num_experts=8, d_expert=8))
    cfg = put(cfg, "model.moe.router", RouterOptions("zzz"))
    (line,) = model_problems(cfg.model)
    assert line == f"model.moe.router.name='zzz': choices are {NAMES}"


def test_choosing_another_router_keeps_what_both_have():
    cfg = change(ExperimentConfig(), num_experts=8, d_expert=8, score="sigmoid", routed_scaling=2.5)
    new = with_router(cfg, "expert_choice")
    assert new.model.moe.router == router_options("expert_choice", routed_scaling=2.5)
    assert put(new, "model.moe.router", cfg.model.moe.router) == cfg  # nothing else is another
    assert with_router(cfg, "mixtral").model.moe.router == router_options("mixtral")  # as published
    back = with_router(new, "token_choice")
    assert back.model.moe.router == router_options(routed_scaling=2.5)  # the score is forgotten
    assert with_router(cfg, "token_choice") == cfg
    with pytest.raises(ConfigError, match="did you mean 'expert_choice'"):
        with_router(cfg, "expert")

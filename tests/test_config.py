"""Configs: whatever cannot work is one ConfigError with the key, the value and what would work."""

import dataclasses
import json
import math
import sys

import pytest
from ml_collections import ConfigDict

from moejax.config import (
    AttentionConfig,
    ConfigError,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
    from_config_dict,
    to_config_dict,
    to_json,
)
from moejax.config_checks import CHOICES, RANGES, divisors_text, model_problems

# Changes of the defaults that turn on what a row needs; keys of the model go without 'model.'.
MOE = {"moe.num_experts": 8, "moe.d_expert": 16}
GROUPS = {**MOE, "moe.num_groups": 4, "moe.topk_groups": 2}
DEVICES = {**MOE, "moe.balance_groups": 2}
EXPERT_CHOICE = {**MOE, "moe.router": "expert_choice", "moe.dispatcher": "capacity"}
MLA = {
    "attention.kind": "mla", "attention.kv_lora_rank": 8, "attention.qk_nope_head_dim": 4,
    "attention.qk_rope_head_dim": 4, "attention.v_head_dim": 4,
}  # fmt: skip
BASES = ({}, MOE, GROUPS, DEVICES, EXPERT_CHOICE, MLA, {**MLA, **GROUPS})
MODEL = tuple(f.name for f in dataclasses.fields(ModelConfig))


def full(key):
    return f"model.{key}" if key.split(".")[0] in MODEL else key


def nested(changes):
    out = {}
    for key, value in changes.items():
        *groups, last = full(key).split(".")
        at = out
        for group in groups:
            at = at.setdefault(group, {})
        at[last] = value
    return out


def problems(changes) -> list[str]:
    """The lines of the ConfigError, none where the config is valid."""
    try:
        from_config_dict(nested(changes))
    except ConfigError as e:
        head, *lines = str(e).splitlines()
        assert head == f"{len(lines)} problem{'s' * (len(lines) > 1)} in the config:"
        assert all(line.startswith("  - ") for line in lines)
        return [line.removeprefix("  - ") for line in lines]
    return []


def leaves(cfg, prefix=""):
    """(key, value) of every option that is not a group."""
    for f in dataclasses.fields(cfg):
        value = getattr(cfg, f.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{f.name}.")
        else:
            yield prefix + f.name, value


LEAVES = dict(leaves(ExperimentConfig()))
NUMBERS = [k for k, v in LEAVES.items() if isinstance(v, int | float) and not isinstance(v, bool)]


@pytest.mark.parametrize("base", BASES)
def test_the_bases_are_valid(base):
    assert not problems(base)


# (a value that is refused, what is said, one that is not) and the keys.
RANGE_ROWS = {
    (0, "=0 must be at least 1", 1):
        "vocab_size d_model num_layers max_seq_len attention.num_heads moe.num_groups "
        "attention.rope.yarn_original_len moe.balance_groups data.vocab_size data.seq_len "
        "data.batch_size train.steps train.accumulation train.log_every train.eval_every "
        "train.eval_batches train.checkpoint_every train.keep_last train.max_bad_steps",
    (0.5, "=0.5 must be at least 1", 1): "attention.rope.yarn_factor",
    (-1, "=-1 must be at least 0", 0):
        "mtp_depth loss_chunk attention.q_lora_rank moe.num_experts moe.shared_experts moe.d_shared "
        "data.max_bytes data.seed optimizer.warmup_steps train.keep_every train.seed",
    (-1e-9, "=-1e-09 must be at least 0", 0):
        "mtp_loss_weight attention.rope.yarn_mscale attention.rope.yarn_mscale_all_dim moe.bias_rate "
        "moe.expert_loss moe.sequence_loss moe.device_loss moe.communication_loss moe.z_loss "
        "moe.activation_limit moe.buffer_factor optimizer.weight_decay optimizer.clip_norm "
        "optimizer.consistent_rms",
    (0, "=0.0 must be above 0", 1e-20):
        "norm_eps init_std moe.routed_scaling moe.capacity_factor attention.rope.yarn_beta_slow "
        "attention.rope.yarn_beta_fast optimizer.learning_rate optimizer.decay_factor optimizer.eps",
    (1, "=1.0 must be above 1", 1.5): "attention.rope.theta",
    (0, "=0.0 must be above 0 and below 1", 0.01): "data.validation_fraction",
    (1, "=1.0 must be above 0 and below 1", 0.99): "data.validation_fraction",
    (-0.1, "=-0.1 must be at least 0 and below 1", 0):
        "optimizer.b1 optimizer.b2 optimizer.momentum",
    (1, "=1.0 must be at least 0 and below 1", 0.999):
        "optimizer.b1 optimizer.b2 optimizer.momentum",
    (-0.1, "=-0.1 must be between 0 and 1", 0): "optimizer.min_lr_ratio",
    (1.1, "=1.1 must be between 0 and 1", 1): "optimizer.min_lr_ratio",
}  # fmt: skip


@pytest.mark.parametrize(
    "key, bad, text, good", [(k, *row) for row, keys in RANGE_ROWS.items() for k in keys.split()]
)
def test_ranges(key, bad, text, good):
    assert full(key) + text in problems({key: bad})
    wanted = text.partition(" ")[2]
    assert not any(p.startswith(full(key)) and p.endswith(wanted) for p in problems({key: good}))
    assert key in sum((keys for _, _, keys in RANGES), ())


@pytest.mark.parametrize("key", NUMBERS)
def test_no_number_may_be_anything(key):
    """A new option needs a range, or a check of its own under one of the bases."""
    name = key.removeprefix("model.")
    assert any(problems({**base, name: -(10**9)}) for base in BASES)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
@pytest.mark.parametrize("key", [k for k, v in LEAVES.items() if isinstance(v, float)])
def test_floats_are_finite(key, value):
    assert problems({key: value}) == [f"{key} must be a finite float, not {value!r}"]


@pytest.mark.parametrize(
    "values, text",
    [
        ({"model": {"moe": {"score_": 3}}}, "unknown key model.moe.score_; did you mean model.moe.score?"),
        ({"data": {"seqlen": 3}}, "unknown key data.seqlen; did you mean data.seq_len?"),
        ({"zzz": 3}, "unknown key zzz; known keys: name, model, data, optimizer, train, mesh"),
        ({"model": {"moe": 8}}, "model.moe must be a group of options, not 8"),
        ({"train": {"steps": True}}, "train.steps must be an int, not True"),
        ({"train": {"steps": "300"}}, "train.steps must be an int, not '300'"),
        ({"train": {"steps": 3.0}}, "train.steps must be an int, not 3.0"),
        ({"optimizer": {"b1": "0.9"}}, "optimizer.b1 must be a float, not '0.9'"),
        ({"optimizer": {"b1": False}}, "optimizer.b1 must be a float, not False"),
        ({"optimizer": {"b1": None}}, "optimizer.b1 must be a float, not None"),
        ({"model": {"scan_layers": 1}}, "model.scan_layers must be a bool, not 1"),
        ({"name": 3}, "name must be a str, not 3"),
        ({"data": {"sources": "builtin"}}, "data.sources must be a tuple of strs, not 'builtin'"),
        ({"data": {"sources": [3]}}, "data.sources must be a tuple of strs, not [3]"),
        ({"data": {"weights": 0.5}}, "data.weights must be a tuple of floats, not 0.5"),
        ({"data": {"weights": ("foo",)}}, "data.weights must be a tuple of floats, not ('foo',)"),
        ({"data": {"weights": (math.nan,)}}, "data.weights must be a tuple of finite floats, not (nan,)"),
        ({"mesh": {"rules": (True,)}}, "mesh.rules must be a tuple of strs, not (True,)"),
    ],
)  # fmt: skip
def test_keys_and_types(values, text):
    for given in (values, ConfigDict(values)):
        with pytest.raises(ConfigError) as e:
            from_config_dict(given)
        # ConfigDict makes tuples of lists.
        assert str(e.value).replace("(3,)", "[3]") == f"1 problem in the config:\n  - {text}"


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
        (MOE, "moe.num_groups", 3, "must be a multiple of model.moe.num_groups=3; 1, 2, 4 or 8 would"),
        (GROUPS, "moe.topk_groups", 0, "=0 must be between 1 and model.moe.num_groups=4"),
        (GROUPS, "moe.topk_groups", 5, "=5 must be between 1 and model.moe.num_groups=4"),
        (GROUPS, "moe.experts_per_token", 6, "fewer than model.moe.experts_per_token=6; topk_groups >= 3"),
        ({**GROUPS, "moe.topk_groups": 1}, "moe.experts_per_token", 3, "1 groups of 2 experts hold fewer"),
        ({**GROUPS, "moe.num_groups": 8}, "moe.group_score", "top2_sum", "needs groups of at least 2 experts"),
        (MOE, "moe.balance_groups", 3, "must be a multiple of model.moe.balance_groups=3; 1, 2, 4 or 8"),
        (MOE, "moe.device_loss", 0.1, "=0.1 needs model.moe.balance_groups > 1"),
        (MOE, "moe.communication_loss", 0.1, "=0.1 needs model.moe.balance_groups > 1"),
        ({**GROUPS, "moe.balance_groups": 2}, "moe.communication_loss", 0.1, "balance_groups=2 must equal"),
        (EXPERT_CHOICE, "moe.dispatcher", "dropless", "='dropless' takes token-choice routes: use 'capacity'"),
        ({}, "data.seq_len", 4097, "=4097 is longer than model.max_seq_len=4096"),
        ({}, "data.sources", (), " is empty: ('builtin',) would work"),
        ({}, "data.weights", (1, 2), " has 2 entries for 1 data.sources"),
        ({}, "data.weights", (0,), "=(0.0,) must not be negative and must not sum to zero"),
        ({"data.sources": ("builtin", "a=b")}, "data.weights", (2, -1), "=(2.0, -1.0) must not be negative"),
        ({}, "optimizer.schedule", "?", "='?': choices are multistep, cosine, wsd, constant"),
        ({}, "optimizer.schedule", "cosin", "='cosin': did you mean 'cosine'? choices are"),
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


@pytest.mark.parametrize(
    "key, value, default",
    [
        ("score", "sigmoid", "'softmax'"), ("normalize_weights", True, "False"),
        ("num_groups", 2, "1"), ("bias_update", "sign", "'none'"),
        ("expert_loss", 0.1, "0.0"), ("sequence_loss", 0.1, "0.0"), ("device_loss", 0.1, "0.0"),
        ("communication_loss", 0.1, "0.0"),
    ],
)  # fmt: skip
def test_expert_choice_refuses_what_it_ignores(key, value, default):
    base = {**EXPERT_CHOICE, "moe.balance_groups": 2}
    assert problems({**base, f"moe.{key}": value}) == [
        f"model.moe.{key}={value!r} is ignored by model.moe.router='expert_choice': "
        f"leave it at {default}"
    ]
    assert not problems({**base, f"moe.{key}": value, "moe.router": "token_choice"})
    read = {"moe.z_loss": 0.1, "moe.routed_scaling": 2, "moe.router_bias": True}
    assert not problems({**EXPERT_CHOICE, **read})


# What a choice needs beside itself.
NEEDS = {
    ("attention.kind", "mla"): MLA,
    ("moe.router", "expert_choice"): EXPERT_CHOICE,
    **{
        (key, value): {**MOE, "moe.activation_limit": 7}
        for key in ("activation", "moe.activation")
        for value in ("swiglu_clamped", "swiglu_oai")
    },
}


@pytest.mark.parametrize("key, value", [(k, v) for k, vs in CHOICES.items() for v in vs])
def test_every_choice_is_accepted(key, value):
    assert not problems({**NEEDS.get((key, value), GROUPS), key: value})


@pytest.mark.parametrize(
    "key",
    [
        "activation", "norm", "positions", "dtype", "remat", "attention.kind", "attention.qk_norm",
        "moe.router", "moe.score", "moe.group_score", "moe.bias_update", "moe.activation",
        "moe.dispatcher", "moe.grouped_matmul", "moe.expert_parallel",
    ],
)  # fmt: skip
def test_choices(key):
    choices = ", ".join(CHOICES[key])
    assert problems({key: "0"}) == [f"model.{key}='0': choices are {choices}"]
    near = CHOICES[key][0]
    (line,) = problems({key: near + "x"})
    assert line == f"model.{key}='{near}x': did you mean {near!r}? choices are {choices}"


def test_what_is_unused_may_be_anything():
    assert not problems({**MLA, "attention.num_kv_heads": 3, "attention.head_dim": 7})
    assert not problems({"positions": "learned", "attention.head_dim": 7})
    assert not problems({**MOE, "num_dense_layers": 0, "d_ff": 0, "activation": "swiglu_oai"})
    assert not problems({"moe.activation": "swiglu_oai", "moe.experts_per_token": 0})
    assert not problems({"optimizer.decay_at": (), "optimizer.clip_norm": 0})
    assert not problems({"mesh.data": 2, "mesh.tensor": -1})


def test_limits_themselves_are_allowed():
    assert not problems({**MOE, "moe.experts_per_token": 8, "data.seq_len": 4096})
    assert not problems({**MOE, "moe.experts_per_token": 1, "num_dense_layers": 3})
    assert not problems({**GROUPS, "moe.topk_groups": 4, "moe.group_score": "top2_sum"})
    assert not problems({**GROUPS, "moe.topk_groups": 1})
    assert not problems({**GROUPS, "moe.num_groups": 8})
    assert not problems({**EXPERT_CHOICE, "moe.dispatcher": "dense"})
    assert not problems({"attention.rope.yarn_beta_slow": 32, "optimizer.decay_at": (1,)})
    assert not problems({"data.sources": ("builtin", "a=b"), "data.weights": (1, 0)})
    assert not problems({"optimizer.schedule": "wsd", "norm_eps": sys.float_info.max})


def test_lists_and_ints_are_taken_for_tuples_and_floats():
    changes = {"data.sources": ["builtin"], "data.weights": [1], "optimizer.weight_decay": 0}
    cfg = from_config_dict(nested({**changes, "attention.windows": [8, 0]}))
    assert cfg.data.sources == ("builtin",) and cfg.model.attention.windows == (8, 0)
    assert repr(cfg.data.weights) == "(1.0,)" and repr(cfg.optimizer.weight_decay) == "0.0"
    hash(cfg)


def test_all_problems_are_reported_at_once():
    lines = problems(
        {**MOE, "moe.experts_per_token": 9, "d_model": 0, "train.steps": 0, "norm": 0.5}
    )
    assert lines == ["model.norm must be a str, not 0.5"]  # values come after types
    lines = problems({"model.norm": 0.5, "train.stepz": 1, "data": 3})
    assert len(lines) == 3
    lines = problems(
        {**MOE, "moe.experts_per_token": 9, "d_model": 0, "train.steps": 0, "norm": "a"}
    )
    assert [line.split("=")[0] for line in lines] == [
        "model.norm", "model.d_model", "model.moe.experts_per_token", "train.steps"
    ]  # fmt: skip


def test_models_alone():
    assert from_config_dict({"d_model": 64}, ModelConfig) == ModelConfig(d_model=64)
    with pytest.raises(ConfigError, match="  - d_model=0 must be at least 1"):
        from_config_dict({"d_model": 0}, ModelConfig)
    assert model_problems(ModelConfig(moe=MoEConfig(num_experts=-1))) == [
        "model.moe.num_experts=-1 must be at least 0"
    ]
    assert from_config_dict({"d_model": 0}, ModelConfig, check=False).d_model == 0
    assert from_config_dict({"num_experts": 3}, MoEConfig) == MoEConfig(num_experts=3)


@pytest.mark.parametrize("base", BASES)
def test_round_trips(base):
    cfg = from_config_dict(nested({**base, "data.sources": ("builtin", "a=b"), "name": "x"}))
    values = to_config_dict(cfg)
    assert values.is_locked and values.model.attention.rope.theta == 10_000.0
    assert values.data.sources == ("builtin", "a=b")
    assert from_config_dict(values) == cfg
    text = to_json(cfg)
    assert text.endswith("}\n") and json.loads(text)["data"]["sources"] == ["builtin", "a=b"]
    assert from_config_dict(json.loads(text)) == cfg
    attention = json.loads(to_json(cfg.model.attention))
    assert from_config_dict(attention, AttentionConfig) == cfg.model.attention


@pytest.mark.parametrize(
    "n, text",
    [(1, "1"), (2, "1 or 2"), (8, "1, 2, 4 or 8"), (9, "1, 3 or 9"), (0, "none"), (-4, "none")],
)
def test_divisors_text(n, text):
    assert divisors_text(n) == text

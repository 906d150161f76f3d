"""Configs: keys, types, ranges and choices, and the ways in and out."""

import dataclasses
import json
import math
import typing

import pytest
from config_case import (
    BASES,
    BIAS,
    COMPRESSED,
    DSA,
    GROUPS,
    HYBRID,
    MLA,
    MOE,
    full,
    nested,
    problems,
)
from flat import change
from ml_collections import ConfigDict

from moejax.config import AttentionConfig, ConfigError, ExperimentConfig, ModelConfig, MoEConfig
from moejax.config_checks import model_problems
from moejax.config_io import (
    from_config_dict,
    from_stored,
    kinds,
    to_config_dict,
    to_json,
    with_router,
)
from moejax.options import bounds_text, choices_of, divisors_text, number
from moejax.options import problems as range_problems
from moejax.routers import ROUTERS, router_options


class Option(typing.NamedTuple):
    """An option that is not a group; `base` chooses its router."""

    key: str
    field: dataclasses.Field
    default: typing.Any
    base: dict


def options(cfg, prefix="", base=None):
    for f in dataclasses.fields(cfg):
        value, key = getattr(cfg, f.name), prefix + f.name
        if dataclasses.is_dataclass(value):
            yield from options(value, key + ".", base)
        else:
            yield Option(key, f, value, base or {})


# Those of every router, too, also where two have one by the same name.
OPTIONS = [o for o in options(ExperimentConfig()) if ".router." not in o.key]
for name in ROUTERS:
    prefix = "model.moe.router."
    OPTIONS += options(router_options(name), prefix, {f"{prefix}name": name})
BOUNDED = [
    o for o in OPTIONS if any(b is not None for b in o.field.metadata.get("bounds", {}).values())
]
CHOSEN = [o for o in OPTIONS if "choices" in o.field.metadata]
NUMBERS = [o for o in OPTIONS if type(o.default) in (int, float)]
by_key = "{0.key}".format


@pytest.mark.parametrize("base", BASES)
def test_the_bases_are_valid(base):
    assert not problems(base)


# --------------------------------------------------------------------------------------------------
# Ranges and choices, which stand beside the fields.

# What is said of a value out of its range, and of which keys.
RANGES = {
    "at least 1":
        "d_model num_layers max_seq_len streams.count streams.sinkhorn_steps attention.num_heads "
        "attention.csa_rate attention.hca_rate attention.rope.yarn_factor "
        "attention.rope.yarn_original_len objective.balance_groups data.vocab_size "
        "data.seq_len data.batch_size train.steps train.accumulation train.log_every train.eval_every "
        "train.eval_batches train.checkpoint_every train.keep_last train.max_bad_steps",
    "at least 0":
        "vocab_size mtp_depth attention.q_lora_rank attention.index_heads attention.index_head_dim "
        "attention.index_topk attention.scale attention.rope.width attention.window_theta "
        "attention.sliding_window attention.o_groups attention.o_lora_rank "
        "attention.rope.yarn_mscale "
        "attention.rope.yarn_mscale_all_dim moe.num_experts moe.shared_experts moe.d_shared moe.latent_dim "
        "moe.activation_limit objective.mtp_loss_weight objective.index_loss objective.bias_rate "
        "objective.expert_loss "
        "objective.sequence_loss objective.device_loss objective.communication_loss objective.z_loss "
        "objective.capacity_factor compute.attention_block compute.loss_chunk compute.buffer_factor "
        "data.max_bytes data.seed "
        "optimizer.warmup_steps optimizer.weight_decay optimizer.clip_norm optimizer.consistent_rms "
        "train.keep_every train.seed",
    "above 0":
        "norm_eps init_std streams.eps embedding_multiplier residual_multiplier logits_divisor "
        "attention.value_scale attention.rope.yarn_beta_slow attention.rope.yarn_beta_fast "
        "optimizer.learning_rate optimizer.eps "
        "optimizer.decay_factor",
    "above 1": "attention.rope.theta attention.compress_theta",
    "above 0 and below 1": "data.validation_fraction",
    "at least 0 and below 1": "optimizer.b1 optimizer.b2 optimizer.momentum",
    "between 0 and 1": "optimizer.min_lr_ratio",
}  # fmt: skip
SAID = {full(key): text for text, keys in RANGES.items() for key in keys.split()}
ROUTERS_OWN = (
    "model.moe.router."  # two routers may have one by the same name: a range is its router's
)


def said(option) -> str:
    """What is said of a value out of this option's range."""
    if option.key.startswith(ROUTERS_OWN):
        return bounds_text(**option.field.metadata["bounds"])
    return SAID[option.key]


def edges(field):
    """(the nearest value inside, the nearest outside) for each bound of a field."""

    def step(x, up):
        if field.type in (int, "int"):
            return x + (1 if up else -1)
        return math.nextafter(float(x), math.inf if up else -math.inf)

    for name, b in field.metadata["bounds"].items():
        if b is not None:
            inside = {"least": b, "most": b, "above": step(b, True), "below": step(b, False)}
            outside = {"least": step(b, False), "most": step(b, True), "above": b, "below": b}
            yield inside[name], outside[name]


@pytest.mark.parametrize("option, good, bad",
                         [(o, *row) for o in BOUNDED for row in edges(o.field)])  # fmt: skip
def test_ranges(option, good, bad):
    key, _, default, base = option
    assert f"{key}={type(default)(bad)} must be {said(option)}" in problems({**base, key: bad})
    text = f"{key}={type(default)(good)} must be {said(option)}"
    assert text not in problems({**base, key: good})


def test_no_range_is_lost():
    assert {o.key for o in BOUNDED if not o.key.startswith(ROUTERS_OWN)} == SAID.keys()
    assert all(o in BOUNDED for o in NUMBERS if o.key in SAID)


@pytest.mark.parametrize("option", NUMBERS, ids=by_key)
def test_no_number_may_be_anything(option):
    """A new option needs a range, or a check of its own under one of the bases."""
    said = f"{option.key.rpartition('.')[2]}=-1000000000"
    changes = {**option.base, option.key: -(10**9)}
    assert any(said in p for base in BASES for p in problems({**base, **changes}))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400])
@pytest.mark.parametrize("option", [o for o in NUMBERS if type(o.default) is float], ids=by_key)
def test_floats_are_finite(option, value):
    (line,) = problems({**option.base, option.key: value})
    assert line.startswith(f"{option.key} must be a finite float, not ")


@pytest.mark.parametrize("option", NUMBERS, ids=by_key)
def test_no_number_is_a_switch_a_text_or_nothing(option):
    key, _, default, base = option
    kind = f"a{'n' * (type(default) is int)} {type(default).__name__}"
    for value in (True, "1", None, (1,)):
        assert problems({**base, key: value}) == [f"{key} must be {kind}, not {value!r}"]
    if type(default) is int:
        assert problems({**base, key: 1.0}) == [f"{key} must be an int, not 1.0"]


CHOICES = {
    "activation": "swiglu swiglu_clamped swiglu_oai gelu_tanh",
    "norm": "rmsnorm layernorm",
    "positions": "rope learned",
    "attention.kind": "mha mla dsa compressed hybrid",
    "attention.qk_norm": "none head full head_rotated",
    "attention.rope_layers": "all windowed",
    "attention.rope.yarn_ramp": "dimension turns",
    "moe.activation": "swiglu swiglu_clamped swiglu_oai gelu_tanh",
    "moe.router.score": "softmax sigmoid sqrt_softplus",
    "moe.router.group_score": "max top2_sum",
    "moe.router.select_by": "score logit",
    "moe.router.rounding": "nearest up down",
    "moe.router.query_norm": "rms none",
    "objective.bias_update": "none sign sign_centered proportional",
    "compute.dtype": "float32 bfloat16 float64",
    "compute.router_dtype": "float32 bfloat16",
    "compute.remat": "none full dots",
    "compute.dispatcher": "auto dense",
    "compute.grouped_matmul": "auto reference ragged tokamax",
    "compute.expert_parallel": "ring all_to_all",
    "optimizer.name": "adamw muon adafactor lion",
    "optimizer.schedule": "multistep cosine wsd constant",
}
# What a choice needs beside itself.
NEEDS = {
    ("attention.kind", "mla"): MLA,
    ("attention.kind", "dsa"): DSA,
    ("attention.kind", "compressed"): COMPRESSED,
    ("attention.kind", "hybrid"): HYBRID,
    ("attention.rope_layers", "windowed"): {"attention.windows": (8,)},
    **{
        (key, value): {**MOE, "moe.activation_limit": 7}
        for key in ("activation", "moe.activation")
        for value in ("swiglu_clamped", "swiglu_oai")
    },
    **{("objective.bias_update", rule): BIAS for rule in ("sign", "sign_centered", "proportional")},
    **{
        ("moe.router.rounding", value): {**MOE, "moe.router.name": "token_rounding"}
        for value in ("nearest", "up", "down")
    },
    **{
        ("moe.router.query_norm", value): {
            **MOE,
            "moe.router.name": "peer",
            "moe.num_experts": 16,
            "moe.experts_per_token": 8,
        }
        for value in ("rms", "none")
    },
}


def test_no_choice_is_lost():
    there = {o.key: " ".join(o.field.metadata["choices"]) for o in CHOSEN}
    assert there == {full(k): v for k, v in CHOICES.items()}
    assert choices_of(ModelConfig, "norm") == ("rmsnorm", "layernorm")


@pytest.mark.parametrize("key, value", [(k, v) for k, vs in CHOICES.items() for v in vs.split()])
def test_every_choice_is_accepted(key, value):
    assert not problems({**NEEDS.get((key, value), GROUPS), key: value})


@pytest.mark.parametrize("option", CHOSEN, ids=by_key)
def test_choices(option):
    key, field, _, base = option
    choices = ", ".join(field.metadata["choices"])
    assert problems({**base, key: "0"}) == [f"{key}='0': choices are {choices}"]
    near = field.metadata["choices"][0]
    lines = problems({**base, key: near + "x"})
    assert f"{key}='{near}x': did you mean {near!r}? choices are {choices}" in lines
    assert field.default in field.metadata["choices"]


def test_ranges_of_groups_in_groups():
    @dataclasses.dataclass
    class Inner:
        x: int = number(3, least=1, most=3)

    @dataclasses.dataclass
    class Outer:
        inner: Inner = dataclasses.field(default_factory=lambda: Inner(4))
        y: float = number(1.0, above=0, most=1)
        z: int = -5  # without a range

    assert range_problems(Outer(y=0.0), "a.") == [
        "a.inner.x=4 must be between 1 and 3", "a.y=0.0 must be above 0 and at most 1"
    ]  # fmt: skip
    assert not range_problems(Outer(inner=Inner(1)))


# --------------------------------------------------------------------------------------------------
# Keys and types.


@pytest.mark.parametrize(
    "values, text",
    [
        ({"model": {"moe": {"d_exprt": 3}}}, "unknown key model.moe.d_exprt; did you mean model.moe.d_expert?"),
        ({"data": {"seqlen": 3}}, "unknown key data.seqlen; did you mean data.seq_len?"),
        ({"zzz": 3},
         "unknown key zzz; known keys: name, model, objective, compute, data, optimizer, train, mesh"),
        ({"train": {"q": 3}},
         "unknown key train.q; known keys: steps, init_from, upcycle, accumulation, log_every, eval_every, "
         "eval_batches, checkpoint_every, keep_last, keep_every, max_bad_steps, rate_may_jump, seed"),
        ({"mdl": {}}, "unknown key mdl; did you mean model?"),
        ({"steps": 3}, "unknown key steps; it is train.steps"),
        ({"seed": 3}, "unknown key seed; it is data.seed or train.seed or model.moe.router.seed"),
        ({"moe": {"num_experts": 3}}, "unknown key moe; it is model.moe"),
        ({"ffn_bias": True}, "unknown key ffn_bias; it is model.ffn_bias or model.moe.ffn_bias"),
        ({"train": {"dtype": "float32"}}, "unknown key train.dtype; it is compute.dtype"),
        ({"model": {"moe": {"expert_loss": 0.1}}},
         "unknown key model.moe.expert_loss; it is objective.expert_loss"),
        ({"model": {"moe": {"score": "sigmoid"}}},
         "unknown key model.moe.score; it is model.moe.router.score"),
        ({"model": {"moe": {"capacity_factor": 1}}},
         "unknown key model.moe.capacity_factor; "
         "it is objective.capacity_factor or model.moe.router.capacity_factor"),
        ({"compute": {"FOR_ROUTES": ()}},
         "unknown key compute.FOR_ROUTES; known keys: dtype, router_dtype, scan_layers, remat, "
         "attention_block, loss_chunk, dispatcher, grouped_matmul, expert_parallel, buffer_factor"),
        ({"model": {"moe": 8}}, "model.moe must be a group of options, not 8"),
        ({"train": {"steps": "300"}}, "train.steps must be an int, not '300'"),
        ({"compute": {"scan_layers": 1}}, "compute.scan_layers must be a bool, not 1"),
        ({"compute": {"scan_layers": "true"}}, "compute.scan_layers must be a bool, not 'true'"),
        ({"name": 3}, "name must be a str, not 3"),
        ({"model": {"norm": True}}, "model.norm must be a str, not True"),
        ({"data": {"sources": "builtin"}}, "data.sources must be a tuple of strs, not 'builtin'"),
        ({"data": {"sources": (3,)}}, "data.sources must be a tuple of strs, not (3,)"),
        ({"data": {"weights": 0.5}}, "data.weights must be a tuple of floats, not 0.5"),
        ({"data": {"weights": ("foo",)}}, "data.weights must be a tuple of floats, not ('foo',)"),
        ({"data": {"weights": (math.nan,)}}, "data.weights must be a tuple of finite floats, not (nan,)"),
        ({"model": {"attention": {"windows": (True,)}}},
         "model.attention.windows must be a tuple of ints, not (True,)"),
        ({"optimizer": {"newton_schulz": 3}}, "optimizer.newton_schulz must be a tuple of tuples, not 3"),
        ({"optimizer": {"newton_schulz": (3,)}},
         "optimizer.newton_schulz must be a tuple of tuples of floats, not (3,)"),
        ({"optimizer": {"newton_schulz": (("a",),)}},
         "optimizer.newton_schulz must be a tuple of tuples of floats, not (('a',),)"),
        ({"mesh": {"rules": (True,)}}, "mesh.rules must be a tuple of strs, not (True,)"),
    ],
)  # fmt: skip
def test_keys_and_types(values, text):
    for given in (values, ConfigDict(values)):
        with pytest.raises(ConfigError) as e:
            from_config_dict(given)
        assert str(e.value) == f"1 problem in the config:\n  - {text}"


def test_a_dotted_key_is_no_group():
    assert problems({"train": {}}) == []
    with pytest.raises(
        ConfigError, match=r"unknown key 'train\.steps'; a group in a group has braces"
    ):
        from_config_dict({"train.steps": 3})


def test_a_message_is_safe_to_print_and_short():
    assert len(str(ConfigError("x" * 10**5 + "\x1b"))) < 10**4
    assert str(ConfigError("\x1b[31m")) == "\\x1b[31m"
    with pytest.raises(ConfigError) as e:
        from_config_dict({"name": ["\x1b[31m" + "x" * 10**5]})
    assert len(str(e.value)) < 300 and "\x1b" not in str(e.value)


# --------------------------------------------------------------------------------------------------
# In and out.


def test_lists_and_ints_are_taken_for_tuples_and_floats():
    changes = {"data.sources": ["builtin"], "data.weights": [1], "objective.z_loss": 0}
    cfg = from_config_dict(nested({**changes, "attention.windows": [8, 0]}))
    assert cfg.data.sources == ("builtin",) and cfg.model.attention.windows == (8, 0)
    assert repr(cfg.data.weights) == "(1.0,)" and repr(cfg.objective.z_loss) == "0.0"
    hash(cfg)


def test_models_alone():
    assert from_config_dict({"d_model": 64}, ModelConfig) == ModelConfig(d_model=64)
    with pytest.raises(ConfigError, match="  - d_model=0 must be at least 1"):
        from_config_dict({"d_model": 0}, ModelConfig)
    with pytest.raises(
        ConfigError, match=r"  - moe\.experts_per_token=9 must be between 1 and moe"
    ):
        from_config_dict(
            {"moe": {"num_experts": 8, "d_expert": 1, "experts_per_token": 9}}, ModelConfig
        )
    assert model_problems(ModelConfig(moe=MoEConfig(num_experts=-1))) == [
        "model.moe.num_experts=-1 must be at least 0"
    ]
    with pytest.raises(ConfigError, match="1 problem in"):  # values come after types
        from_config_dict({"d_model": 0, "norm": 3}, ModelConfig)
    assert from_config_dict({"d_model": 0}, ModelConfig, check=False).d_model == 0
    assert from_config_dict({"train": {"steps": 0}}, check=False).train.steps == 0
    assert from_config_dict({"num_experts": 3}, MoEConfig) == MoEConfig(num_experts=3)
    with pytest.raises(ConfigError, match="unknown key d_modl; did you mean d_model"):
        from_config_dict({"d_modl": 0}, ModelConfig)


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


@pytest.mark.parametrize("name", ROUTERS)
def test_a_stored_config_is_the_same_again(name):
    cfg = change(ExperimentConfig(), router=name)
    values = json.loads(to_json(cfg))
    assert from_stored(values) == cfg
    # A key that is not there means its default, and so does a group.
    del values["train"], values["compute"]["remat"]
    own = values["model"]["moe"]["router"]
    for key in set(own) - {"name"}:
        del own[key]
        assert from_stored(values) == cfg
    assert from_stored(values) == cfg
    assert from_stored({"model": {"moe": {"router": {"name": name}}}}) == cfg
    with pytest.raises(ConfigError, match=r"unknown key model\.moe\.router\.scale"):
        from_stored({"model": {"moe": {"router": {"name": name, "scale": 1}}}})


def test_kinds_are_those_of_the_router_at_hand():
    got = kinds(with_router(ExperimentConfig(), "expert_choice"))
    assert got["model.moe.router.capacity_factor"] is float and got["train.steps"] is int
    assert "model.moe.router.score" not in got and got["model.moe"] is MoEConfig
    assert (
        typing.get_args(got["data.weights"]) == (float, ...) and got["compute.scan_layers"] is bool
    )


@pytest.mark.parametrize(
    "n, text",
    [(1, "1"), (2, "1 or 2"), (8, "1, 2, 4 or 8"), (9, "1, 3 or 9"), (0, "none"), (-4, "none")],
)
def test_divisors_text(n, text):
    assert divisors_text(n) == text

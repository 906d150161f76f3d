"""What is wrong with a config, in sentences that name the keys and what would work: choices, ranges, and what
must fit together. `config.from_config_dict` calls this; types are checked there.
"""

import difflib
import math
import typing
from typing import Any

from moejax.axes import ROLES
from moejax.param_groups import parse_rule

if typing.TYPE_CHECKING:
    from moejax.config import ExperimentConfig, ModelConfig, MoEConfig, OptimizerConfig

CHOICES = {
    "activation": ("swiglu", "swiglu_clamped", "swiglu_oai", "gelu_tanh"),
    "norm": ("rmsnorm", "layernorm"),
    "positions": ("rope", "learned"),
    "dtype": ("float32", "bfloat16", "float64"),
    "remat": ("none", "full", "dots"),
    "attention.kind": ("mha", "mla"),
    "attention.qk_norm": ("none", "head", "full"),
    "moe.router": ("token_choice", "expert_choice"),
    "moe.score": ("softmax", "sigmoid", "sqrt_softplus"),
    "moe.group_score": ("max", "top2_sum"),
    "moe.bias_update": ("none", "sign", "sign_centered", "proportional", "frozen"),
    "moe.activation": ("swiglu", "swiglu_clamped", "swiglu_oai", "gelu_tanh"),
    "moe.dispatcher": ("dense", "capacity", "dropless"),
    "moe.grouped_matmul": ("auto", "reference", "blocked", "ragged", "tokamax"),
    "moe.expert_parallel": ("ring", "all_to_all"),
}

CLAMPED = ("swiglu_clamped", "swiglu_oai")  # the activations with a limit

# Ranges that hold whatever the other options are.
RANGES = (
    ("at least 1", lambda x: x >= 1, (
        "vocab_size", "d_model", "num_layers", "max_seq_len", "attention.num_heads",
        "attention.rope.yarn_factor", "attention.rope.yarn_original_len", "moe.num_groups",
        "moe.balance_groups", "data.vocab_size", "data.seq_len", "data.batch_size", "train.steps",
        "train.accumulation", "train.log_every", "train.eval_every", "train.eval_batches",
        "train.checkpoint_every", "train.keep_last", "train.max_bad_steps",
    )),
    ("at least 0", lambda x: x >= 0, (
        "mtp_depth", "mtp_loss_weight", "loss_chunk", "attention.q_lora_rank",
        "attention.rope.yarn_mscale", "attention.rope.yarn_mscale_all_dim", "moe.num_experts",
        "moe.shared_experts", "moe.d_shared", "moe.bias_rate", "moe.expert_loss",
        "moe.sequence_loss", "moe.device_loss", "moe.communication_loss", "moe.z_loss",
        "moe.activation_limit", "moe.buffer_factor", "data.max_bytes", "data.seed",
        "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_norm",
        "optimizer.consistent_rms",
        "train.keep_every", "train.seed",
    )),
    ("above 0", lambda x: x > 0, (
        "norm_eps", "init_std", "attention.rope.yarn_beta_fast", "attention.rope.yarn_beta_slow",
        "moe.routed_scaling", "moe.capacity_factor", "optimizer.learning_rate",
        "optimizer.decay_factor", "optimizer.eps",
    )),
    ("above 1", lambda x: x > 1, ("attention.rope.theta",)),
    ("above 0 and below 1", lambda x: 0 < x < 1, ("data.validation_fraction",)),
    ("at least 0 and below 1", lambda x: 0 <= x < 1, (
        "optimizer.b1", "optimizer.b2", "optimizer.momentum",
    )),
    ("between 0 and 1", lambda x: 0 <= x <= 1, ("optimizer.min_lr_ratio",)),
)  # fmt: skip

# Options of the MoE layer that 'expert_choice' does not read: softmax is its score, its loads are equal.
TOKEN_CHOICE_ONLY = (
    "score", "normalize_weights", "num_groups", "bias_update",
    "expert_loss", "sequence_loss", "device_loss", "communication_loss",
)  # fmt: skip

# The options that an optimiser reads, besides those that all of them read.
READS = {
    "adamw": ("b1", "b2", "eps", "weight_decay"),
    "muon": (
        "b1", "b2", "eps", "weight_decay", "momentum", "newton_schulz", "consistent_rms", "muon_roles",
    ),
    "adafactor": ("weight_decay",),
    "lion": ("b1", "b2", "weight_decay"),
}  # fmt: skip


def _get(cfg: Any, dotted: str) -> Any:
    for part in dotted.split("."):
        cfg = getattr(cfg, part)
    return cfg


def choice_problem(key: str, value: str, choices: typing.Iterable[str]) -> str | None:
    """None if `value` is one of `choices`, else a sentence with the nearest and all of them."""
    choices = tuple(choices)
    if value in choices:
        return None
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{key}={value!r}: {hint}choices are {', '.join(choices)}"


def _range_problems(cfg: Any, prefix: str) -> list[str]:
    """A sentence for each number of `cfg` that is out of its range."""
    return [
        f"{prefix}{key}={_get(cfg, key)} must be {text}"
        for text, ok, keys in RANGES
        for key in keys
        if hasattr(cfg, key.split(".")[0]) and not ok(_get(cfg, key))
    ]


def model_problems(cfg: "ModelConfig", prefix: str = "model.") -> list[str]:
    """Every inconsistency of a model config, as sentences."""
    out = [choice_problem(prefix + k, _get(cfg, k), v) for k, v in CHOICES.items()]
    problems = [p for p in out if p] + _range_problems(cfg, prefix)

    def need(ok: bool, text: str):
        if not ok:
            problems.append(text)

    p, a, m = prefix, cfg.attention, cfg.moe
    need(
        0 <= cfg.num_dense_layers <= cfg.num_layers,
        f"{p}num_dense_layers={cfg.num_dense_layers} must be between 0 and "
        f"{p}num_layers={cfg.num_layers}",
    )
    dense = cfg.num_moe_layers < cfg.num_layers
    if dense:
        need(cfg.d_ff > 0, f"{p}d_ff={cfg.d_ff} must be positive: there are dense layers")
    if a.kind == "mha":
        need(
            a.num_kv_heads > 0 and a.num_heads % a.num_kv_heads == 0,
            f"{p}attention.num_heads={a.num_heads} must be a multiple of "
            f"{p}attention.num_kv_heads={a.num_kv_heads}; {divisors_text(a.num_heads)} would work",
        )
        need(
            a.head_dim > 0 and (a.head_dim % 2 == 0 or cfg.positions != "rope"),
            f"{p}attention.head_dim={a.head_dim} must be positive, and even for rotary positions",
        )
    elif a.kind == "mla":
        for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            need(
                getattr(a, key) > 0,
                f"{p}attention.{key}={getattr(a, key)} must be positive for 'mla'",
            )
        need(
            a.qk_rope_head_dim % 2 == 0,
            f"{p}attention.qk_rope_head_dim={a.qk_rope_head_dim} must be even",
        )
        need(cfg.positions == "rope", f"{p}positions={cfg.positions!r}: 'mla' needs 'rope'")
        need(not a.sinks, f"{p}attention.sinks is not available with 'mla'")
    need(all(w >= 0 for w in a.windows), f"{p}attention.windows={a.windows} must not be negative")
    need(
        a.rope.yarn_beta_slow <= a.rope.yarn_beta_fast,
        f"{p}attention.rope.yarn_beta_slow={a.rope.yarn_beta_slow} must be at most "
        f"{p}attention.rope.yarn_beta_fast={a.rope.yarn_beta_fast}",
    )
    for key, used in (("activation", dense), ("moe.activation", m.num_experts > 0)):
        need(
            not used or _get(cfg, key) not in CLAMPED or m.activation_limit > 0,
            f"{p}{key}={_get(cfg, key)!r} needs {p}moe.activation_limit > 0 (gpt-oss 7, V4 10)",
        )
    if m.num_experts > 0:
        problems += _moe_problems(m, p + "moe.")
        need(
            cfg.num_dense_layers < cfg.num_layers,
            f"{p}num_dense_layers={cfg.num_dense_layers} leaves no layer for the "
            f"{p}moe.num_experts={m.num_experts} experts: lower it below {p}num_layers="
            f"{cfg.num_layers}, or set num_experts=0 for a dense model",
        )
    return problems


def _moe_problems(m: "MoEConfig", p: str) -> list[str]:
    problems = []

    def need(ok: bool, text: str):
        if not ok:
            problems.append(text)

    need(
        1 <= m.experts_per_token <= m.num_experts,
        f"{p}experts_per_token={m.experts_per_token} must be between 1 and "
        f"{p}num_experts={m.num_experts}",
    )
    need(m.d_expert > 0, f"{p}d_expert={m.d_expert} must be positive: the FFN width of an expert")
    if m.num_groups > 1:
        size = m.num_experts // m.num_groups
        need(
            m.num_experts % m.num_groups == 0,
            f"{p}num_experts={m.num_experts} must be a multiple of {p}num_groups={m.num_groups}; "
            f"{divisors_text(m.num_experts)} would work",
        )
        need(
            1 <= m.topk_groups <= m.num_groups,
            f"{p}topk_groups={m.topk_groups} must be between 1 and {p}num_groups={m.num_groups}",
        )
        need(
            m.topk_groups < 1 or m.topk_groups * size >= m.experts_per_token,
            f"{p}topk_groups={m.topk_groups} groups of {size} experts hold fewer than "
            f"{p}experts_per_token={m.experts_per_token}; "
            f"topk_groups >= {-(-m.experts_per_token // max(size, 1))} would work",
        )
        need(
            m.group_score != "top2_sum" or size >= 2,
            f"{p}group_score='top2_sum' needs groups of at least 2 experts, not {size}",
        )
    need(
        m.num_experts % max(m.balance_groups, 1) == 0,
        f"{p}num_experts={m.num_experts} must be a multiple of "
        f"{p}balance_groups={m.balance_groups}; {divisors_text(m.num_experts)} would work",
    )
    for key in ("device_loss", "communication_loss"):
        need(
            getattr(m, key) == 0 or m.balance_groups > 1,
            f"{p}{key}={getattr(m, key)} needs {p}balance_groups > 1 (the devices it balances)",
        )
    need(
        m.communication_loss == 0 or m.num_groups in (1, m.balance_groups),
        f"{p}communication_loss={m.communication_loss} counts devices as groups: {p}balance_groups="
        f"{m.balance_groups} must equal {p}num_groups={m.num_groups}",
    )
    if m.router == "expert_choice":
        need(
            m.dispatcher == "dense" or m.dispatcher == "capacity",
            f"{p}router='expert_choice' fills slots; {p}dispatcher={m.dispatcher!r} takes token-choice "
            "routes: use 'capacity'",
        )
        for key in TOKEN_CHOICE_ONLY:
            value, default = getattr(m, key), getattr(type(m), key)
            need(
                value == default,
                f"{p}{key}={value!r} is ignored by {p}router='expert_choice': leave it at {default!r}",
            )
    return problems


def experiment_problems(cfg: "ExperimentConfig") -> list[str]:
    """Inconsistencies between the groups of an experiment."""
    problems = _range_problems(cfg, "")

    def need(ok: bool, text: str):
        if not ok:
            problems.append(text)

    d, o, t, m = cfg.data, cfg.optimizer, cfg.train, cfg.mesh
    need(
        d.seq_len <= cfg.model.max_seq_len,
        f"data.seq_len={d.seq_len} is longer than model.max_seq_len={cfg.model.max_seq_len}",
    )
    need(len(d.sources) > 0, "data.sources is empty: ('builtin',) would work")
    need(
        not d.weights or len(d.weights) == len(d.sources),
        f"data.weights has {len(d.weights)} entries for {len(d.sources)} data.sources",
    )
    need(
        not d.weights or (min(d.weights) >= 0 and sum(d.weights) > 0),
        f"data.weights={d.weights} must not be negative and must not sum to zero",
    )
    p = choice_problem("optimizer.schedule", o.schedule, ("multistep", "cosine", "wsd", "constant"))
    problems += [p] if p else []
    problems += _optimizer_problems(o)
    need(
        all(0 < x <= 1 for x in o.decay_at) and (o.schedule != "wsd" or len(o.decay_at) > 0),
        f"optimizer.decay_at={o.decay_at} must be fractions of the run, in (0, 1]",
    )
    need(
        t.accumulation < 1 or d.batch_size % t.accumulation == 0,
        f"data.batch_size={d.batch_size} must be a multiple of train.accumulation={t.accumulation}; "
        f"{divisors_text(d.batch_size)} would work",
    )
    sizes = [m.data, m.fsdp, m.expert, m.tensor]
    need(
        all(s >= 1 or s == -1 for s in sizes) and sizes.count(-1) <= 1,
        f"mesh sizes must be positive, at most one of them -1; got data={m.data}, fsdp={m.fsdp}, "
        f"expert={m.expert}, tensor={m.tensor}",
    )
    return problems


def _optimizer_problems(o: "OptimizerConfig") -> list[str]:
    p = choice_problem("optimizer.name", o.name, READS)
    if p:
        return [p]
    problems = []
    for key in sorted({key for keys in READS.values() for key in keys} - {*READS[o.name]}):
        value, default = getattr(o, key), getattr(type(o), key)
        if value != default:
            readers = " and ".join(repr(name) for name, keys in READS.items() if key in keys)
            problems.append(
                f"optimizer.{key}={value!r} is not read by optimizer.name={o.name!r} but by {readers}: "
                f"leave it at {default!r}, or name another optimizer"
            )
    rows = o.newton_schulz
    if not rows or any(len(r) != 4 or r[0] < 1 or r[0] % 1 for r in rows):
        problems.append(
            f"optimizer.newton_schulz={rows} must be rows (times, a, b, c) with a whole number of times"
        )
    roles = tuple(r for r in ROLES if r != "vector")
    if not o.muon_roles or {*o.muon_roles} - {*roles}:
        problems.append(f"optimizer.muon_roles={o.muon_roles} must name some of {', '.join(roles)}")
    for text in o.groups:
        try:
            parse_rule(text)
        except ValueError as e:
            problems.append(f"optimizer.groups: {e}")
    return problems


def divisors_text(n: int) -> str:
    """'1, 2, 4 or 8' for 8, for error messages."""
    if n < 1:
        return "none"
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    ds = [str(i) for i in sorted({*small, *(n // i for i in small)})]
    return ds[0] if len(ds) == 1 else ", ".join(ds[:-1]) + f" or {ds[-1]}"

"""What is wrong with a config, in sentences that name the keys and what would work: ranges and choices (which
stand beside the fields), and what must fit together. `config_io.from_config_dict` calls this; types are checked
there.
"""

import dataclasses
from collections.abc import Iterable

from moejax import options
from moejax.attention import ATTENTIONS
from moejax.axes import ROLES
from moejax.config import ExperimentConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from moejax.options import Problems, divisors_text
from moejax.param_groups import parse_rule
from moejax.routers import ROUTERS
from moejax.routers.specials import SPECIALS

CLAMPED = ("swiglu_clamped", "swiglu_oai")  # the activations with a limit

# Fields of BalanceConfig that only say how: without a loss or rule they mean nothing.
_PARAMETERS = ("bias_rate", "balance_groups")

# ... and those that the kind of attention reads.
_OF_ATTENTION = frozenset().union(*(kind.objectives for kind in ATTENTIONS.values()))

# The options that an optimiser reads, besides those that all of them read.
READS = {
    "adamw": ("b1", "b2", "eps", "weight_decay"),
    "muon": (
        "b1", "b2", "eps", "weight_decay", "momentum", "newton_schulz", "consistent_rms", "muon_roles",
    ),
    "adafactor": ("weight_decay",),
    "lion": ("b1", "b2", "weight_decay"),
}  # fmt: skip


def model_problems(
    cfg: ModelConfig, prefix: str = "model.", objective: ObjectiveConfig | None = None
) -> list[str]:
    """Every inconsistency of a model, and of what it is trained for if that is given, as sentences."""
    out = Problems(options.problems(cfg, prefix))
    p, m = prefix, cfg.moe
    out.need(
        0 <= cfg.num_dense_layers <= cfg.num_layers,
        f"{p}num_dense_layers={cfg.num_dense_layers} must be between 0 and "
        f"{p}num_layers={cfg.num_layers}",
    )
    at = cfg.dense_at
    out.need(
        not at or at == tuple(i for i in range(cfg.num_layers) if i in at),
        f"{p}dense_at={at} must be numbers of layers below {p}num_layers={cfg.num_layers}, in order",
    )
    out.need(
        not at or (len(at) == cfg.num_dense_layers and m.num_experts > 0),
        f"{p}dense_at={at} needs {p}num_dense_layers={len(at)} and experts in the other layers",
    )
    dense = cfg.num_moe_layers < cfg.num_layers
    if dense:
        out.need(cfg.d_ff > 0, f"{p}d_ff={cfg.d_ff} must be positive: there are dense layers")
    out += _attention_problems(cfg, p, objective or ObjectiveConfig())
    limit = m.activation_limit
    for key, name, used in (
        ("activation", cfg.activation, dense),
        ("moe.activation", m.activation, m.num_experts > 0),
    ):
        out.need(
            not used or name not in CLAMPED or limit > 0,
            f"{p}{key}={name!r} needs {p}moe.activation_limit > 0 (gpt-oss 7, V4 10)",
        )
    if m.num_experts > 0:
        out += _moe_problems(cfg, p + "moe.", objective or ObjectiveConfig())
        out.need(
            cfg.num_dense_layers < cfg.num_layers,
            f"{p}num_dense_layers={cfg.num_dense_layers} leaves no layer for the "
            f"{p}moe.num_experts={m.num_experts} experts: lower it below {p}num_layers="
            f"{cfg.num_layers}, or set num_experts=0 for a dense model",
        )
    return out


def _attention_problems(cfg: ModelConfig, p: str, objective: ObjectiveConfig) -> list[str]:
    out, a = Problems(), cfg.attention
    if a.kind in ATTENTIONS:  # the choices beside the field say so
        out += ATTENTIONS[a.kind].problems(cfg, p)
        for key in sorted(_OF_ATTENTION - ATTENTIONS[a.kind].objectives):
            value, default = getattr(objective, key), getattr(ObjectiveConfig(), key)
            out.need(
                value == default,
                f"objective.{key}={value!r} is not read by {p}attention.kind={a.kind!r}: leave it at "
                f"{default!r}",
            )
        learns = "index_loss" in ATTENTIONS[a.kind].objectives and objective.index_loss > 0
        out.need(
            not learns or bool(ATTENTIONS[a.kind].losses(cfg, objective)),
            f"objective.index_loss={objective.index_loss} teaches nothing: no layer has an indexer",
        )
    out.need(
        not objective.index_dense or objective.index_loss > 0,
        "objective.index_dense needs objective.index_loss > 0: it is the warm-up of what that loss teaches",
    )
    windows = a.windows
    out.need(all(w >= 0 for w in windows), f"{p}attention.windows={windows} must not be negative")
    out.need(
        a.rope_layers != "windowed" or any(windows),
        f"{p}attention.rope_layers={a.rope_layers!r} needs {p}attention.windows",
    )
    out.need(
        a.rope.yarn_ramp != "turns" or a.rope.yarn_beta_slow < a.rope.yarn_beta_fast,
        f"{p}attention.rope.yarn_ramp='turns' needs {p}attention.rope.yarn_beta_slow="
        f"{a.rope.yarn_beta_slow} below {p}attention.rope.yarn_beta_fast={a.rope.yarn_beta_fast}",
    )
    out.need(
        a.rope.yarn_beta_slow <= a.rope.yarn_beta_fast,
        f"{p}attention.rope.yarn_beta_slow={a.rope.yarn_beta_slow} must be at most "
        f"{p}attention.rope.yarn_beta_fast={a.rope.yarn_beta_fast}",
    )
    return out


def _moe_problems(cfg: ModelConfig, p: str, objective: ObjectiveConfig) -> list[str]:
    out, m = Problems(), cfg.moe
    out.need(
        1 <= m.experts_per_token <= m.num_experts,
        f"{p}experts_per_token={m.experts_per_token} must be between 1 and "
        f"{p}num_experts={m.num_experts}",
    )
    out.need(
        m.d_expert > 0, f"{p}d_expert={m.d_expert} must be positive: the FFN width of an expert"
    )
    groups = objective.balance_groups
    out.need(
        m.num_experts % max(groups, 1) == 0,
        f"{p}num_experts={m.num_experts} must be a multiple of "
        f"objective.balance_groups={groups}; {divisors_text(m.num_experts)} would work",
    )
    for key in ("device_loss", "communication_loss"):
        out.need(
            getattr(objective, key) == 0 or groups > 1,
            f"objective.{key}={getattr(objective, key)} needs objective.balance_groups > 1 "
            "(the devices it balances)",
        )
    if m.router.name not in ROUTERS:
        problem = options.choice_problem(f"{p}router.name", m.router.name, ROUTERS)
        return [*out, problem or ""]
    router = ROUTERS[m.router.name]
    here = dataclasses.replace(cfg, num_dense_layers=0).router_config(objective)
    out += router.problems(here, p)
    out.need(
        not cfg.dense_at or bool(out) or not router.carries(here),
        f"dense_at={cfg.dense_at}: {p}router.name={m.router.name!r} passes something from layer to layer, and "
        "dense layers between would stop it",
    )
    for field in dataclasses.fields(objective):
        value = getattr(objective, field.name)
        read = field.name in (*router.balance, *_PARAMETERS, "mtp_loss_weight", *_OF_ATTENTION)
        if field.name == "capacity_factor":
            read = router.form == "token"
        out.need(
            read or value == field.default,
            f"objective.{field.name}={value!r} is not read by {p}router.name={m.router.name!r}: "
            f"leave it at {field.default!r}",
        )
    for kind in router.specials(here) if not out else ():
        problem = options.choice_problem(f"a special expert of {m.router.name!r}", kind, SPECIALS)
        out += [problem] if problem else []
    return out


def experiment_problems(cfg: ExperimentConfig) -> list[str]:
    """Everything wrong with an experiment, its model included."""
    out = Problems(model_problems(cfg.model, "model.", cfg.objective))
    for name in ("objective", "compute", "data", "optimizer", "train", "mesh"):
        out += options.problems(getattr(cfg, name), name + ".")
    d, o, t, m, c = cfg.data, cfg.optimizer, cfg.train, cfg.mesh, cfg.compute
    router = cfg.model.router
    if router is not None and router.form != "token":
        # Slots, mixes and merged experts are laid out by the compiler; nothing is sent row by row.
        for key in c.FOR_ROUTES:
            value, default = getattr(c, key), getattr(type(c)(), key)
            out.need(
                value == default,
                f"compute.{key}={value!r} is about routes of tokens, and the router "
                f"{cfg.model.moe.router.name!r} makes none (its form is {router.form!r}): "
                f"leave it at {default!r}",
            )
    out.need(
        d.seq_len <= cfg.model.max_seq_len,
        f"data.seq_len={d.seq_len} is longer than model.max_seq_len={cfg.model.max_seq_len}",
    )
    out.need(len(d.sources) > 0, "data.sources is empty: ('builtin',) would work")
    out.need(
        not d.weights or len(d.weights) == len(d.sources),
        f"data.weights has {len(d.weights)} entries for {len(d.sources)} data.sources",
    )
    out.need(
        not d.weights or (min(d.weights) >= 0 and sum(d.weights) > 0),
        f"data.weights={d.weights} must not be negative and must not sum to zero",
    )
    out += _optimizer_problems(o)
    out.need(
        all(0 < x <= 1 for x in o.decay_at) and (o.schedule != "wsd" or len(o.decay_at) > 0),
        f"optimizer.decay_at={o.decay_at} must be fractions of the run, in (0, 1]",
    )
    out.need(
        t.accumulation < 1 or d.batch_size % t.accumulation == 0,
        f"data.batch_size={d.batch_size} must be a multiple of train.accumulation={t.accumulation}; "
        f"{divisors_text(d.batch_size)} would work",
    )
    out.need(
        bool(t.init_from) or not t.upcycle,
        "train.upcycle needs the dense model to begin from: train.init_from=RUN",
    )
    sizes = [m.data, m.fsdp, m.expert, m.tensor]
    out.need(
        all(s >= 1 or s == -1 for s in sizes) and sizes.count(-1) <= 1,
        f"mesh sizes must be positive, at most one of them -1; got data={m.data}, fsdp={m.fsdp}, "
        f"expert={m.expert}, tensor={m.tensor}",
    )
    return out


def training_doubts(cfg: ExperimentConfig) -> list[str]:
    """What may be meant, but not in training."""
    moe, router = cfg.model.moe, cfg.model.moe.router
    if (
        cfg.model.router is not None
        and moe.experts_per_token == 1 < moe.num_experts
        and getattr(router, "normalize_weights", False)
    ):
        return [
            "model.moe.experts_per_token=1 with model.moe.router.normalize_weights=True: the one weight is "
            "always 1, so the router learns from balancing alone, and nothing from the text; "
            "model.moe.router.normalize_weights=False would teach it"
        ]
    return []


def _optimizer_problems(o: OptimizerConfig) -> list[str]:
    out = Problems()
    mine = READS.get(o.name)
    if mine is None:  # the choices beside the field say so
        return out
    for key in sorted({key for keys in READS.values() for key in keys} - {*mine}):
        value, default = getattr(o, key), getattr(OptimizerConfig(), key)
        readers = " and ".join(repr(name) for name, keys in READS.items() if key in keys)
        out.need(
            value == default,
            f"optimizer.{key}={value!r} is not read by optimizer.name={o.name!r} but by {readers}: "
            f"leave it at {default!r}, or name another optimizer",
        )
    rows, roles = o.newton_schulz, tuple(r for r in ROLES if r != "vector")
    out.need(
        bool(rows) and all(len(r) == 4 and r[0] >= 1 and r[0] % 1 == 0 for r in rows),
        f"optimizer.newton_schulz={rows} must be rows (times, a, b, c) with a whole number of times",
    )
    out.need(
        bool(o.muon_roles) and not {*o.muon_roles} - {*roles},
        f"optimizer.muon_roles={o.muon_roles} must name some of {', '.join(roles)}",
    )
    for text in o.groups:
        try:
            parse_rule(text)
        except ValueError as e:
            out.append(f"optimizer.groups: {e}")
    return out


def problems_text(problems: Iterable[str]) -> str:
    """'3 problems in the config:' and a line for each."""
    lines = list(problems)
    return f"{len(lines)} problem{'s' * (len(lines) > 1)} in the config:\n" + "\n".join(
        f"  - {p}" for p in lines
    )

"""Reading the fields of a Hugging Face `config.json`: present, sane, supported."""

import dataclasses
from typing import Any

from moejax.config import ConfigError, ModelConfig, ObjectiveConfig, RopeConfig
from moejax.models.zoo.keys import words
from moejax.text import shown

# No published model comes near; a larger value is a typing error or a hostile file.
MAX_SIZE = 2**24
# What `decoder_from_hf` and `rope_from_hf` read, and the parts of rope_scaling by its kind.
DECODER = words(
    """
    vocab_size hidden_size num_hidden_layers num_attention_heads max_position_embeddings rms_norm_eps
    hidden_act initializer_range tie_word_embeddings rope_theta rope_scaling rope_parameters
    """
)
_ROPE = words("rope_type type rope_theta factor original_max_position_embeddings")
ROPE = {
    "yarn": _ROPE | words("beta_fast beta_slow mscale mscale_all_dim truncate attention_factor"),
    "llama3": _ROPE | words("low_freq_factor high_freq_factor"),
}
ROPE["default"] = ROPE["yarn"]


def sizes(hf: dict, family: str, *names: str) -> dict[str, int]:
    """The named fields, each an integer in [1, MAX_SIZE]; ConfigError names all that are not."""
    missing = [n for n in names if hf.get(n) is None]
    if missing:
        raise ConfigError(
            f"{family} config: missing {', '.join(missing)}; a {family} config.json has "
            f"{', '.join(names)}"
        )
    return {n: size(hf, family, n) for n in names}


def size(hf: dict, family: str, name: str, default: int | None = None, least: int = 1) -> int:
    """One integer field in [least, MAX_SIZE]; an absent or null field is `default`."""
    value = hf.get(name)
    if value is None:
        if default is None:
            raise ConfigError(f"{family} config: missing {name}")
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= MAX_SIZE:
        raise ConfigError(
            f"{family} config: {name}={shown(value)} must be an integer between {least} and {MAX_SIZE}"
        )
    return value


def number(hf: dict, family: str, name: str, default: float, least: float = 0.0) -> float:
    """One finite number, at least `least`; an absent or null field is `default`."""
    value = hf.get(name)
    if value is None:
        return default
    # Compared, not converted: an integer may be too large for a float.
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e300 < value < 1e300:
        raise ConfigError(f"{family} config: {name}={shown(value)} must be a number")
    if value < least:
        raise ConfigError(f"{family} config: {name}={shown(value)} must be at least {least}")
    return float(value)


def only(hf: dict, family: str, name: str, *allowed: Any) -> Any:
    """A field that must have one of `allowed`; absent means the first of them."""
    value = hf.get(name, allowed[0])
    if value not in allowed:
        raise ConfigError(
            f"{family} config: {name}={shown(value)} is not supported; "
            f"{' or '.join(repr(a) for a in allowed)} would work"
        )
    return value


def flag(hf: dict, family: str, name: str, default: bool = False) -> bool:
    value = hf.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ConfigError(f"{family} config: {name}={shown(value)} must be true or false")
    return value


def given(hf: dict, family: str, *names: str) -> None:
    """ConfigError for fields that are left out and whose defaults differ between the original model
    code, `transformers` and its versions; null is a value."""
    missing = [n for n in names if n not in hf]
    if missing:
        raise ConfigError(
            f"{family} config: {', '.join(missing)} must be given: published code has several defaults"
        )


def items(hf: dict, family: str, name: str) -> list:
    """A list; an absent or null field is an empty one."""
    value = hf.get(name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(f"{family} config: {name}={shown(value)} must be a list or null")
    return value


def head_dim(hf: dict, family: str) -> int:
    """`head_dim`, or hidden_size / num_attention_heads where it is not given."""
    d, n = hf["hidden_size"], hf["num_attention_heads"]
    if hf.get("head_dim") is None and d % n:
        raise ConfigError(f"{family} config: hidden_size={d} is not a multiple of {n} heads")
    return size(hf, family, "head_dim", d // n)


def same(hf: dict, family: str, name: str, other: str) -> dict:
    """`hf` with what it calls by another name under `name`; ConfigError where both are given and differ."""
    value, alias = hf.get(name), hf.get(other)
    if value is not None and alias is not None and value != alias:
        raise ConfigError(
            f"{family} config: {name}={shown(value)} and {other}={shown(alias)} name the same thing; "
            "leave one out"
        )
    return hf if alias is None else {**hf, name: alias}


def rope_from_hf(
    hf: dict,
    family: str,
    *,
    interleaved: bool = False,
    mla: bool = False,
    default_theta: float | None = 10_000.0,
    default_scaling: dict | None = None,
    default_part: float | None = None,
) -> RopeConfig:
    """RoPE, YaRN and LLaMA 3's scaling from `rope_theta` + `rope_scaling`, or from the newer `rope_parameters`.

    `rope_scaling` wins where a file has both: it was added by hand to a newer file. Without a
    `default_theta` the base must be given. With a `default_part` a part of each head may be rotated.
    """
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters")
    scaling = (default_scaling or {}) if scaling is None else scaling
    if not isinstance(scaling, dict):
        raise ConfigError(
            f"{family} config: rope_scaling={shown(scaling)} must be an object or null"
        )
    if any(c.get("rope_theta", 1.0) is None for c in (hf, scaling)):
        raise ConfigError(f"{family} config: rope_theta=null has no meaning; give a number")
    if default_theta is None:
        given(hf | scaling, family, "rope_theta")
    theta = number(hf | scaling, family, "rope_theta", default_theta or 10_000.0, least=1.0)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in (*ROPE,):
        raise ConfigError(
            f"{family} config: rope_scaling type {shown(kind)} is not supported; "
            "'yarn', 'llama3' or null would"
        )
    part = {"partial_rotary_factor"} if default_part else set()
    known, neutral = ROPE[kind] | part, {"partial_rotary_factor": 1.0}
    odd = [k for k, v in scaling.items() if k not in known and v not in (None, neutral.get(k))]
    if odd:
        raise ConfigError(
            f"{family} config: rope_scaling has {odd[0]}={shown(scaling[odd[0]])}, which is not known; "
            f"{', '.join(sorted(known))} are"
        )
    width = 0
    if default_part:
        d = head_dim(hf, family)
        share = number(hf | scaling, family, "partial_rotary_factor", default_part, least=2 / d)
        width = int(d * share) if share != 1 else 0
    plain = RopeConfig(theta=theta, interleaved=interleaved, width=width)
    if kind == "default":
        return plain
    if scaling.get("attention_factor") is not None:
        raise ConfigError(
            f"{family} config: rope_scaling.attention_factor is not supported; "
            "leave it out (it follows from factor and mscale)"
        )
    mscale, mscale_all_dim = _mscale(scaling, family, mla)
    slow, fast = "beta_slow", "beta_fast"
    if kind == "llama3":
        mscale, slow, fast = 0.0, "low_freq_factor", "high_freq_factor"
        given(scaling, family + " rope_scaling", slow, fast, "original_max_position_embeddings")
    longest = hf["max_position_embeddings"]
    original = longest
    if "original_max_position_embeddings" in scaling:
        original = size(scaling, family, "original_max_position_embeddings")
    if "factor" not in scaling:
        raise ConfigError(
            f"{family} config: rope_scaling.factor is required; null means max_position_embeddings / "
            "original_max_position_embeddings"
        )
    return dataclasses.replace(
        plain,
        yarn_factor=number(scaling, family, "factor", longest / original, least=1.0),
        yarn_original_len=original,
        yarn_beta_fast=number(scaling, family, fast, 32.0),
        yarn_beta_slow=number(scaling, family, slow, 1.0),
        yarn_mscale=mscale,
        yarn_mscale_all_dim=mscale_all_dim,
        yarn_truncate=flag(scaling, family, "truncate", True),
        yarn_ramp="turns" if kind == "llama3" else "dimension",
    )


def _mscale(scaling: dict, family: str, mla: bool) -> tuple[float, float]:
    """mscale and mscale_all_dim, which count only together."""
    mscale = number(scaling, family, "mscale", 0.0)
    all_dim = number(scaling, family, "mscale_all_dim", 0.0)
    if mscale and all_dim and mla:
        return mscale, all_dim
    if mscale and all_dim:
        raise ConfigError(
            f"{family} config: rope_scaling.mscale_all_dim={all_dim} beside mscale changes the scale of "
            "queries and keys as only multi-head latent attention defines it; leave both out"
        )
    if mla and (all_dim or scaling.get("mscale") not in (None, 1.0)):
        # DeepSeek's own code applies one without the other, `transformers` neither.
        raise ConfigError(
            f"{family} config: rope_scaling has mscale or mscale_all_dim without the other, which has two "
            "meanings in published code; give both or none"
        )
    return 1.0, 0.0


def layers_of(hf: dict, family: str, name: str, *kinds: Any) -> list:
    """A list with one of `kinds` for each layer; an absent or null field is an empty one."""
    values, layers = items(hf, family, name), hf["num_hidden_layers"]
    if values and (len(values) != layers or not all(v in kinds for v in values)):
        raise ConfigError(
            f"{family} config: {name} must hold {layers} times "
            f"{' or '.join(repr(k) for k in kinds)}, not {shown(values)}"
        )
    return values


def dense_layers(dense: list[bool]) -> dict:
    """Keyword arguments of ModelConfig, of a flag for each layer."""
    at = tuple(i for i, is_dense in enumerate(dense) if is_dense)
    if at == tuple(range(len(at))) or len(at) == len(dense):
        at = ()
    return {"num_dense_layers": sum(dense), "dense_at": at}


def rope_to_hf(rope: RopeConfig, *, mla: bool = False) -> dict:
    """The keys `rope_theta` and `rope_scaling`."""
    if rope.yarn_factor == 1.0:
        return {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.yarn_ramp == "turns":
        scaling = {
            "rope_type": "llama3",
            "factor": rope.yarn_factor,
            "original_max_position_embeddings": rope.yarn_original_len,
            "low_freq_factor": rope.yarn_beta_slow,
            "high_freq_factor": rope.yarn_beta_fast,
        }
        return {"rope_theta": rope.theta, "rope_scaling": scaling}
    scaling = {
        "rope_type": "yarn",
        "type": "yarn",
        "factor": rope.yarn_factor,
        "original_max_position_embeddings": rope.yarn_original_len,
        "beta_fast": rope.yarn_beta_fast,
        "beta_slow": rope.yarn_beta_slow,
    }
    if mla:
        scaling |= {"mscale": rope.yarn_mscale, "mscale_all_dim": rope.yarn_mscale_all_dim}
    if not rope.yarn_truncate:
        scaling["truncate"] = False
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def switch_objective(hf: dict, family: str, default: float = 0.001) -> ObjectiveConfig:
    """The load-balancing loss of `transformers` as one of ours.

    Its loss is E sum_i c_i P_i with c_i the routes to expert i per token, K times DeepSeekMoE's
    (2401.06066 eq. 12-14), whose f_i are per token and chosen expert.
    """
    k = size(hf, family, "num_experts_per_tok")
    return ObjectiveConfig(expert_loss=k * number(hf, family, "router_aux_loss_coef", default))


def switch_objective_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    return {"router_aux_loss_coef": objective.expert_loss / cfg.moe.experts_per_token}


def deepseek_objective(hf: dict, family: str, default: float) -> ObjectiveConfig:
    """`aux_loss_alpha` weighs the balance loss of each sequence (`seq_aux`) or of the batch."""
    alpha = number(hf, family, "aux_loss_alpha", default)
    if flag(hf, family, "seq_aux", True):
        return ObjectiveConfig(sequence_loss=alpha)
    return ObjectiveConfig(expert_loss=alpha)


def deepseek_objective_to_hf(objective: ObjectiveConfig) -> dict:
    return {
        "aux_loss_alpha": objective.sequence_loss or objective.expert_loss,
        "seq_aux": objective.sequence_loss > 0,
    }


def decoder_to_hf(cfg, **family_keys) -> dict:
    """The keys every rotary, RMSNorm family shares, and those given."""
    return {
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.d_model,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.attention.num_heads,
        "max_position_embeddings": cfg.max_seq_len,
        "rms_norm_eps": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": cfg.tie_embeddings,
        "hidden_act": "silu",
        "use_cache": True,
        **family_keys,
    }


def decoder_from_hf(hf: dict, family: str) -> dict:
    """Keyword arguments of ModelConfig that every rotary, RMSNorm family shares."""
    only(hf, family, "hidden_act", "silu")
    n = sizes(
        hf,
        family,
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    given(hf, family, "rms_norm_eps")
    return {
        "vocab_size": n["vocab_size"],
        "d_model": n["hidden_size"],
        "num_layers": n["num_hidden_layers"],
        "max_seq_len": n["max_position_embeddings"],
        "norm_eps": number(hf, family, "rms_norm_eps", 1e-6),
        "init_std": number(hf, family, "initializer_range", 0.02),
        "tie_embeddings": flag(hf, family, "tie_word_embeddings"),
    }

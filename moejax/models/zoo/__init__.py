"""Published models as data: `load_preset("deepseek-moe-16b")`, `config_from_hf(a config.json)`.

`configs/*.json` are the published `config.json` files, with two keys of our own: `_note` says what
is inferred, and `_training` holds the options that the paper (its `source`) gives
and config.json does not: initialiser, balance losses, bias rule. Several names share a file where
the published architectures are the same.
"""

import dataclasses
import difflib
import json
import pathlib
from types import ModuleType

from moejax.config import ConfigError, ModelConfig, MoEConfig, ObjectiveConfig
from moejax.config_checks import model_problems
from moejax.models.zoo import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    deepseek_v4,
    deepseek_v32,
    dots1,
    ernie4_5_moe,
    exaone_moe,
    glm4_moe,
    glm4_moe_lite,
    glm_moe_dsa,
    gpt2,
    gpt_oss,
    granitemoe,
    hunyuan_v1_moe,
    keys,
    llama,
    mimo_v2_flash,
    minimax_m2,
    mistral,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    solar_open,
)
from moejax.models.zoo.architecture import architecture
from moejax.routers import ROUTERS
from moejax.text import plain, shown

# Hugging Face model_type -> the module that reads and writes it. Of several that can express a model, `moejax
# export` takes the first.
FAMILIES: dict[str, ModuleType] = {
    "deepseek": deepseek,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "kimi_k2": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "deepseek_v4": deepseek_v4,
    "gpt2": gpt2,
    "gpt_oss": gpt_oss,
    "llama": llama,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "mistral": mistral,
    "qwen3": qwen3,
    "granitemoe": granitemoe,
    "dots1": dots1,
    "glm4_moe": glm4_moe,
    "glm4_moe_lite": glm4_moe_lite,
    "glm_moe_dsa": glm_moe_dsa,
    "ernie4_5_moe": ernie4_5_moe,
    "hunyuan_v1_moe": hunyuan_v1_moe,
    "minimax_m2": minimax_m2,
    "exaone_moe": exaone_moe,
    "solar_open": solar_open,
    "mimo_v2_flash": mimo_v2_flash,
}

# Architectures that moejax counts (`moejax.cost`) and does not run.
COUNTED_ONLY = ("deepseek_v41",)

# Model name -> file in configs/.
PRESETS: dict[str, str] = {
    "deepseek-llm-7b": "deepseek-llm-7b",
    "deepseek-llm-67b": "deepseek-llm-67b",
    "deepseek-moe-2b": "deepseek-moe-2b",
    "deepseek-moe-16b": "deepseek-moe-16b",
    "deepseek-moe-16b-base": "deepseek-moe-16b",
    "deepseek-moe-16b-chat": "deepseek-moe-16b",
    "deepseek-moe-145b": "deepseek-moe-145b",
    "deepseek-v2-lite": "deepseek-v2-lite",
    "deepseek-v2": "deepseek-v2",
    "deepseek-v2.5": "deepseek-v2.5",
    "deepseek-v3": "deepseek-v3",
    "deepseek-v3-0324": "deepseek-v3",
    "deepseek-v3.1": "deepseek-v3",
    "deepseek-r1": "deepseek-r1",
    "deepseek-v3.2-exp": "deepseek-v3.2",
    "deepseek-v3.2": "deepseek-v3.2",
    "deepseek-v4-flash": "deepseek-v4-flash",
    "deepseek-v4-flash-0731": "deepseek-v4-flash-0731",
    "deepseek-v4-pro": "deepseek-v4-pro",
    "moonlight-16b-a3b": "moonlight-16b-a3b",
    "kimi-k2": "kimi-k2",
    "llama-1-65b": "llama-1-65b",
    "llama-2-7b": "llama-2-7b",
    "llama-2-13b": "llama-2-13b",
    "llama-2-70b": "llama-2-70b",
    "llama-3-8b": "llama-3-8b",
    "llama-3-70b": "llama-3-70b",
    "llama-3.1-8b": "llama-3.1-8b",
    "llama-3.1-70b": "llama-3.1-70b",
    "llama-3.3-70b": "llama-3.1-70b",
    "llama-3.1-405b": "llama-3.1-405b",
    "llama-3.2-1b": "llama-3.2-1b",
    "llama-3.2-3b": "llama-3.2-3b",
    "mistral-7b": "mistral-7b",
    "gpt-2": "gpt2",
    "gpt-2-medium": "gpt2-medium",
    "gpt-2-large": "gpt2-large",
    "gpt-2-xl": "gpt2-xl",
    "gpt-oss-20b": "gpt-oss-20b",
    "gpt-oss-120b": "gpt-oss-120b",
    "mixtral-8x7b": "mixtral-8x7b",
    "qwen1.5-moe-a2.7b": "qwen1.5-moe-a2.7b",
    "qwen3-0.6b": "qwen3-0.6b",
    "qwen3-8b": "qwen3-8b",
    "qwen3-32b": "qwen3-32b",
    "qwen3-30b-a3b": "qwen3-30b-a3b",
    "granite-3.0-1b-a400m": "granite-3.0-1b-a400m",
    "granite-3.0-3b-a800m": "granite-3.0-3b-a800m",
    "dots.llm1": "dots.llm1",
    "glm-4.5": "glm-4.5",
    "glm-4.5-air": "glm-4.5-air",
    "glm-4.7-flash": "glm-4.7-flash",
    "ernie-4.5-21b-a3b": "ernie-4.5-21b-a3b",
    "hunyuan-a13b": "hunyuan-a13b",
    "minimax-m2": "minimax-m2",
    "k-exaone-236b-a23b": "k-exaone-236b-a23b",
    "solar-open-100b": "solar-open-100b",
    "glm-4.6": "glm-4.6",
    "glm-5": "glm-5",
    "mimo-v2-flash": "mimo-v2-flash",
    "olmoe-1b-7b": "olmoe-1b-7b",
}

# As PRESETS, for models that are only counted: architectures in COUNTED_ONLY, weights that nobody has.
COUNTED_PRESETS: dict[str, str] = {
    "gpt-3": "gpt3",
    "deepseek-v4.1-flash": "deepseek-v4.1-flash",
}

CONFIGS = pathlib.Path(__file__).parent / "configs"


def unknown_name(name: str, known) -> str:
    """An error text with the nearest of the known names."""
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return f"unknown model {name!r}; {hint}known models: {', '.join(sorted(known))}"


def load_hf(name: str) -> dict:
    """The published config.json of a model, runnable or only counted; unknown name: ConfigError."""
    files = PRESETS | COUNTED_PRESETS
    if name not in files:
        raise ConfigError(unknown_name(name, files))
    return json.loads((CONFIGS / f"{files[name]}.json").read_text())


def _stated(hf: dict, group: str) -> dict:
    """What the paper states of one group of options: field -> value."""
    keys = {k.partition("."): v for k, v in hf.get("_training", {}).items()}
    return {field: v for (of, _, field), v in keys.items() if of == group}


def load_preset(name: str) -> ModelConfig:
    """The ModelConfig of a published model, with the initialiser that its paper states.

    Raises ConfigError for an unknown name (with the nearest ones) and for a model that cannot run.
    """
    hf = load_hf(name)
    return dataclasses.replace(config_from_hf(hf), **_stated(hf, "model"))


def load_objective(name: str) -> ObjectiveConfig:
    """What a published model was trained for, as its config.json and its paper state it; errors as
    `load_preset`."""
    hf = load_hf(name)
    return dataclasses.replace(objective_from_hf(hf), **_stated(hf, "objective"))


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a parsed config.json, by its `model_type`.

    Raises ConfigError, naming what would work, for a model type we do not know, a missing or absurd
    field, an option that ModelConfig cannot express, or a key that the family does not know.
    """
    kind = hf.get("model_type") if isinstance(hf, dict) else None
    if not isinstance(kind, str):
        raise ConfigError("a config.json must be an object with a model_type such as 'mixtral'")
    if kind in COUNTED_ONLY:
        raise ConfigError(f"model_type {kind!r} can be counted (plan, models) but not run")
    if kind not in FAMILIES:
        raise ConfigError(f"unknown model_type {shown(kind)}; known: {', '.join(FAMILIES)}")
    unknown = keys.unknown(hf, FAMILIES[kind])
    if unknown:
        raise ConfigError(
            f"{kind} config: {', '.join(f'{plain(k)}={shown(hf[k])}' for k in unknown[:6])}: "
            f"{len(unknown)} keys that moejax does not know, and so may not ignore. If they change nothing, "
            f"go on without them: moejax import --ignore_keys={','.join(unknown[:6])}"
        )
    cfg = FAMILIES[kind].config_from_hf(hf)
    problems = model_problems(cfg, "")
    if problems:
        raise ConfigError(f"{kind} config: " + "; ".join(problems))
    return cfg


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    """What a model with this config.json was trained for, as far as the file says; errors as
    `config_from_hf`."""
    config_from_hf(hf)
    read = getattr(FAMILIES[hf["model_type"]], "objective_from_hf", None)
    return read(hf) if read else ObjectiveConfig()


def config_to_hf(
    cfg: ModelConfig, model_type: str, objective: ObjectiveConfig | None = None
) -> dict:
    """The config.json of `cfg` as a model of that type, trained for `objective`.

    Raises ConfigError, naming the fields, when the family cannot express `cfg`: when reading the
    result back would give another model.
    """
    if model_type not in FAMILIES:
        raise ConfigError(f"unknown model_type {model_type!r}; known: {', '.join(FAMILIES)}")
    lost = lost_fields(cfg, model_type)
    if lost:
        raise ConfigError(
            f"a {model_type} config.json cannot express this model: {'; '.join(lost)}. "
            f"Families that can: {', '.join(families_for(cfg)) or 'none'}"
        )
    return FAMILIES[model_type].config_to_hf(cfg, objective or ObjectiveConfig())


def families_for(cfg: ModelConfig) -> list[str]:
    """The model types whose config.json can express `cfg`."""
    return [t for t in FAMILIES if not lost_fields(cfg, t)]


def lost_fields(cfg: ModelConfig, model_type: str) -> list[str]:
    """The architecture fields that change when `cfg` is written as `model_type` and read back."""
    family = FAMILIES[model_type]
    router, theirs = cfg.moe.router.name, getattr(family, "ROUTER", MoEConfig().router.name)
    if cfg.num_moe_layers and router != theirs:
        if not _same_formula(router, theirs):
            return [f"moe.router.name={router!r} (would become {theirs!r})"]
        named = dataclasses.replace(cfg.moe.router, name=theirs)
        cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, router=named))
    before = architecture(cfg)
    try:
        after = architecture(family.config_from_hf(family.config_to_hf(cfg, ObjectiveConfig())))
    except ConfigError as e:
        return [str(e)]
    return [
        f"{key}={before[key]!r} (would become {after[key]!r})"
        for key in before
        if before[key] != after[key]
    ]


def _same_formula(one: str, other: str) -> bool:
    """Whether two routers differ by their papers and default options alone, as mixtral and token_choice."""
    first, second = ROUTERS[one], ROUTERS[other]
    alike = {"options": first.options, "source": "", "about": "", "recipe": ()}
    return type(first.options) is type(second.options) and (
        dataclasses.replace(first, **alike) == dataclasses.replace(second, **alike)
    )

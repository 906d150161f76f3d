"""Mixture-of-Experts language models in JAX: pure functions, explicit state, experiments as config.

What a notebook needs, each imported when first used:

    ExperimentConfig, ModelConfig, MoEConfig, ObjectiveConfig, ComputeConfig     options (moejax.config)
    ROUTERS, router_options                  the table of routers; the options of one
    load_preset                              a published model: "deepseek-moe-16b" -> ModelConfig
    init_model                               (cfg, key) -> parameters and router state
    forward, logits                          tokens [B, S] -> hidden states [B, S, D] -> logits [B, S, V]
    loss_fn                                  batch -> loss in nats per token, and its parts
    moe_layer                                one MoE layer on plain arrays
    train_experiment                         (ExperimentConfig, folder) -> last validation metrics
    load_run                                 the folder of a run -> config, parameters, tokenizer
    generate                                 prompts as token ids -> new token ids
"""

import importlib
import typing

if typing.TYPE_CHECKING:
    from moejax.config import (
        ComputeConfig,
        ExperimentConfig,
        ModelConfig,
        MoEConfig,
        ObjectiveConfig,
    )
    from moejax.evals.generate import generate
    from moejax.models.loss import loss_fn
    from moejax.models.transformer import forward, init_model, logits
    from moejax.models.zoo import load_preset
    from moejax.moe.layer import moe as moe_layer
    from moejax.routers import ROUTERS, router_options
    from moejax.runs.open import load_run
    from moejax.train.loop import train as train_experiment

__version__ = "0.2.0"
__all__ = [
    "ROUTERS",
    "ComputeConfig",
    "ExperimentConfig",
    "MoEConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "forward",
    "generate",
    "init_model",
    "load_preset",
    "load_run",
    "logits",
    "loss_fn",
    "moe_layer",
    "router_options",
    "train_experiment",
]

# Name -> module and name there. `moejax.moe` and `moejax.train` are folders, so two names are longer here.
_HOMES = {
    **dict.fromkeys(__all__[1:6], "moejax.config"),
    **dict.fromkeys(("forward", "init_model", "logits"), "moejax.models.transformer"),
    **dict.fromkeys(("ROUTERS", "router_options"), "moejax.routers"),
    "generate": "moejax.evals.generate",
    "load_preset": "moejax.models.zoo",
    "load_run": "moejax.runs.open",
    "loss_fn": "moejax.models.loss",
    "moe_layer": "moejax.moe.layer",
    "train_experiment": "moejax.train.loop",
}
_THERE = {"moe_layer": "moe", "train_experiment": "train"}


def __getattr__(name: str):
    """A name of `__all__`, from its module: `import moejax` alone loads no JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moejax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), _THERE.get(name, name))

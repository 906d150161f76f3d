"""Sliding windows in config.json: one for each layer, by `layer_types`."""

from moejax.config import ModelConfig
from moejax.models.zoo import fields

SLIDING, FULL = "sliding_attention", "full_attention"
# Qwen's keys; the window counts only with use_sliding_window.
QWEN = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})


def from_hf(hf: dict, family: str, otherwise: list[bool], default: int | None = None) -> tuple:
    """The shortest repeating tuple of windows; 0 = full attention. `otherwise`: which layers have a window
    where there is no `layer_types`; `default`: the window where there is none."""
    kinds = fields.layers_of(hf, family, "layer_types", SLIDING, FULL)
    slides = [k == SLIDING for k in kinds] or otherwise
    if not any(slides):
        fields.size(hf, family, "sliding_window", 0, least=0)
        return ()
    window = fields.size(hf, family, "sliding_window", None if "sliding_window" in hf else default)
    every = tuple(window * s for s in slides)
    periods = range(1, len(every) + 1)
    return next(every[:p] for p in periods if all(w == every[i % p] for i, w in enumerate(every)))


def from_qwen(hf: dict, family: str, slides) -> tuple:
    """As `from_hf`, of files with `use_sliding_window`. `slides(layer, max_window_layers)`: has a window."""
    last = fields.size(hf, family, "max_window_layers", 28, least=0)
    if fields.flag(hf, family, "use_sliding_window"):
        return from_hf(hf, family, [slides(i, last) for i in range(hf["num_hidden_layers"])])
    fields.size(hf, family, "sliding_window", 0, least=0)
    fields.layers_of(hf, family, "layer_types", FULL)
    return ()


def to_hf(cfg: ModelConfig) -> dict:
    """The keys `sliding_window` and `layer_types`; a model has one window."""
    a = cfg.attention
    kinds = [SLIDING if a.window(i) else FULL for i in range(cfg.num_layers)]
    return {"sliding_window": max(a.windows, default=0) or None, "layer_types": kinds}


def to_qwen(cfg: ModelConfig) -> dict:
    return {
        **to_hf(cfg),
        "use_sliding_window": any(cfg.attention.windows),
        "max_window_layers": cfg.num_layers,
    }

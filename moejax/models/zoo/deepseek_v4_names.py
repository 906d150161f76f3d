"""The tensors of DeepSeek-V4: as published, as modules of `transformers`, and the mixture that it saves."""

from collections.abc import Iterable, Iterator

import numpy as np

from moejax.config import ModelConfig
from moejax.models.zoo.names import COPY, HALVES, TRANSPOSE, Row, Table, Transform

_Part = tuple[str, str, str, Transform]


def _linear(path: str, published: str, own: str) -> _Part:
    return path, published + ".weight", own + ".weight", TRANSPOSE


def _norm(path: str, published: str, own: str) -> _Part:
    return path + "/scale", published + ".weight", own + ".weight", COPY


def _streams(path: str, published: str, own: str) -> Iterator[_Part]:
    """The same weights in each spelling: `own` ends in what comes before fn, base and scale."""
    for ours, theirs, how in (
        ("kernel", "fn", TRANSPOSE),
        ("base", "base", COPY),
        ("scale", "scale", COPY),
    ):
        yield f"{path}/{ours}", published + theirs, own + theirs, how


def _compressor(path: str, published: str, own: str) -> Iterator[_Part]:
    yield _linear(f"{path}/w_kv", f"{published}.wkv", f"{own}.kv_proj")
    yield _linear(f"{path}/w_gate", f"{published}.wgate", f"{own}.gate_proj")
    yield f"{path}/position_bias", f"{published}.ape", f"{own}.position_bias", COPY
    yield _norm(f"{path}/norm", f"{published}.norm", f"{own}.kv_norm")


# (our path, published name, name in `transformers`, transform), relative to a block.
_BLOCK = (
    _norm("attn_norm", "attn_norm", "input_layernorm"),
    _norm("ffn_norm", "ffn_norm", "post_attention_layernorm"),
    *_streams("attn_streams", "hc_attn_", "attn_hc."),
    *_streams("ffn_streams", "hc_ffn_", "ffn_hc."),
    _linear("attn/w_q_a", "attn.wq_a", "self_attn.q_a_proj"),
    _norm("attn/q_norm", "attn.q_norm", "self_attn.q_a_norm"),
    _linear("attn/w_q_b", "attn.wq_b", "self_attn.q_b_proj"),
    _linear("attn/w_kv", "attn.wkv", "self_attn.kv_proj"),
    _norm("attn/kv_norm", "attn.kv_norm", "self_attn.kv_norm"),
    _norm("attn/kv_norm", "attn.norm", "self_attn.kv_norm"),  # as `transformers` 5.24 saves it
    _linear("attn/w_o_a", "attn.wo_a", "self_attn.o_a_proj"),
    _linear("attn/w_o_b", "attn.wo_b", "self_attn.o_b_proj"),
    ("attn/sinks", "attn.attn_sink", "self_attn.sinks", COPY),
    _linear("moe/router/kernel", "ffn.gate", "mlp.gate"),
    *(
        _linear(
            f"moe/shared/w_{ours}", f"ffn.shared_experts.{w}", f"mlp.shared_experts.{ours}_proj"
        )
        for ours, w in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    ),
    *(
        (f"moe/experts/w_{ours}", f"ffn.experts.{{expert}}.{w}.weight", f"mlp.experts.{own}", how)
        for ours, w, own, how in (
            ("gate", "w1", "gate_up_proj", HALVES[0]),
            ("down", "w2", "down_proj", TRANSPOSE),
            ("up", "w3", "gate_up_proj", HALVES[1]),
        )
    ),
)
_OWN = {
    "hca_attn": tuple(_compressor("compressor", "attn.compressor", "self_attn.compressor")),
    "csa_attn": (
        *_compressor("compressor", "attn.compressor", "self_attn.compressor"),
        *_compressor(
            "indexer/compressor", "attn.indexer.compressor", "self_attn.compressor.indexer"
        ),
        _linear("indexer/w_q", "attn.indexer.wq_b", "self_attn.compressor.indexer.q_b_proj"),
        _linear(
            "indexer/w_heads",
            "attn.indexer.weights_proj",
            "self_attn.compressor.indexer.scorer.weights_proj",
        ),
    ),
}
_STATE = (
    ("expert_bias", "ffn.gate.bias", "mlp.gate.e_score_correction_bias", COPY),
    ("table", "ffn.gate.tid2eid", "mlp.gate.tid2eid", COPY),
)
_TOP = (
    ("embed/tokens", "embed.weight", "model.embed_tokens.weight", COPY),
    *_streams("streams_head", "hc_head_", "model.hc_head.hc_"),
    _norm("final_norm", "norm", "model.norm"),
    _linear("head", "head", "lm_head"),
)
_DEPTH = (
    _linear("embed_proj", "e_proj", "-"),
    _linear("hidden_proj", "h_proj", "-"),
    _norm("embed_norm", "enorm", "-"),
    _norm("hidden_norm", "hnorm", "-"),
    _norm("norm", "norm", "-"),
    *_streams("streams_head", "hc_head_", "-"),
    *((f"block/{path}", published, own, how) for path, published, own, how in _BLOCK),
)


def _rows(parts: Iterable[_Part], path: str, published: str, own: str = "") -> Iterator[Row]:
    """Rows under `path`, in every spelling; without `own` in the published one alone."""
    for ours, theirs, other, how in parts:
        # One tensor holds all experts there, and gate and up projections.
        single = how if "{expert}" not in theirs else TRANSPOSE
        yield Row(path + ours, published + theirs, single)
        if own:
            yield Row(path + ours, own + other, how)
            yield Row(path + ours, "model." + published + theirs, single)


_LAYER = "layers.{layer}."
_MODULE = "model." + _LAYER


def holds(cfg: ModelConfig, path: str, layer: int) -> bool:
    """Whether files hold this array of this layer: a layer routes by its table or by its bias, and config.json
    says by which."""
    by_table = layer < cfg.moe.router.hash_layers
    name = path.rpartition("/")[2]
    return {"table": by_table, "expert_bias": not by_table, "hashed": False}.get(name, True)


def wrong(cfg: ModelConfig, path: str, values: np.ndarray) -> str:
    """What is wrong with (a part of) the tensor at `path`; '' if nothing is."""
    experts = cfg.moe.num_experts
    if not path.endswith("/table") or not values.size:
        return ""
    low, high = values.min(), values.max()
    if low < 0 or high >= experts:
        return f"names expert {low if low < 0 else high}; there are {experts}, from 0 on"
    rows = np.sort(values.reshape(-1, values.shape[-1]), axis=-1)
    twice = (rows[:, 1:] == rows[:, :-1]).any(axis=-1)
    if values.shape[-1] == cfg.moe.experts_per_token and twice.any():
        return f"names an expert twice for token {int(twice.argmax())}, and {int(twice.sum())} tokens in all"
    return ""


NAMES = Table(
    rows=(
        *(Row(path, published, how) for path, published, _, how in _TOP),
        *(Row(path, own, how) for path, _, own, how in _TOP),
        *_rows(_BLOCK, "moe_blocks/", _LAYER, _MODULE),
        *(row for name, parts in _OWN.items() for row in _rows(parts, f"{name}/", _LAYER, _MODULE)),
        *_rows(_STATE, "router_state/moe_blocks/", _LAYER, _MODULE),
        *_rows(_DEPTH, "mtp/", "mtp.{depth}."),
        *_rows(_STATE, "router_state/mtp/", "mtp.{depth}."),
    ),
    holds=holds,
    wrong=wrong,
)

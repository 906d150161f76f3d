"""Where every parameter stands in a Hugging Face checkpoint: tables of data, read by `moejax.interop`.

A `Row` pairs a parameter's path with the name of its tensors in the file. `{layer}` and `{expert}` in
the name are the parameter's leading axes, which the file keeps as separate tensors; `{layer}` counts
through the whole model (dense blocks, then MoE blocks, then multi-token prediction), `{depth}` the depths of
multi-token prediction alone. A row whose
parameter a config does not have is not used, so a table is the union over a family's configs.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moejax.config import ModelConfig


class Transform(NamedTuple):
    """How a tensor of the file becomes a parameter: linear, exact, invertible.

    Attributes:
      transpose: the file has [out, in], as torch's Linear, and the parameter [in, out].
      part, parts: the parameter is part number `part` of `parts` equal parts of the file's output axis.
      lead: the file has a leading axis of 1 besides.
      interleaved: the parts alternate along that axis (0, 1, 0, 1, ..) instead of following another.
    """

    transpose: bool = False
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    lead: bool = False


COPY = Transform()
TRANSPOSE = Transform(transpose=True)
# GPT-2's c_attn: queries, keys and values side by side on the output axis, which is last there.
THIRDS = tuple(Transform(part=i, parts=3) for i in range(3))
LEAD = Transform(lead=True)
# Gate and up projections of experts in one tensor, [E, 2F, D].
HALVES = tuple(Transform(transpose=True, part=i, parts=2) for i in range(2))
# gpt-oss's gate_up_proj: even columns are the gate, odd ones the up projection.
EVEN, ODD = (Transform(part=i, parts=2, interleaved=True) for i in range(2))


class Row(NamedTuple):
    """Attributes:
    path: of the parameter, '/'-separated; under 'router_state/' for what rules learn.
    hf: name in the file, with {layer} or {depth}, and {expert}.
    transform: file to parameter.
    """

    path: str
    hf: str
    transform: Transform = COPY


class Duplicate(NamedTuple):
    """A tensor that repeats another one. Reading checks that it does.

    Attributes:
      hf: its name; {layer} stands for the layers of multi-token prediction.
      of: the tensor it repeats: the first of these names that the model has.
      written: whether `export` writes it.
    """

    hf: str
    of: tuple[str, ...]
    written: bool


class Table(NamedTuple):
    """Attributes:
    rows: every parameter the family can have. Of several rows for one, the first is written, and the first
      of which a file has a tensor is read.
    duplicates: tensors that repeat others.
    ignorable: regular expressions of whole names that carry nothing learned (buffers).
    prefix: what some files leave out at the start of every name.
    holds: (cfg, path, number of the layer) -> whether files have this array of this layer. Where they do not,
      it is router state, and that of a new model.
    wrong: (cfg, path, values of a tensor) -> what is wrong with them, '' if nothing is.
    """

    rows: tuple[Row, ...]
    duplicates: tuple[Duplicate, ...] = ()
    ignorable: tuple[str, ...] = ()
    prefix: str = ""
    holds: Callable[[ModelConfig, str, int], bool] = lambda cfg, path, layer: True
    wrong: Callable[[ModelConfig, str, np.ndarray], str] = lambda cfg, path, values: ""


# Rotary frequencies, saved as a buffer by older versions of `transformers` (LLaMA 2, Kimi K2).
ROTARY_BUFFER = (
    r"model\.layers\.[0-9]+\.self_attn\.rotary_emb\.inv_freq|model\.rotary_emb\.inv_freq"
)
# Files of tied models may hold the head all the same.
TIED_HEAD = Duplicate("lm_head.weight", ("model.embed_tokens.weight",), written=False)

BLOCK = "model.layers.{layer}."

# --------------------------------------------------------------------------------------------------
# Rows that families share. Paths and names of blocks are relative to the block.

DECODER = (
    Row("embed/tokens", "model.embed_tokens.weight"),
    Row("final_norm/scale", "model.norm.weight"),
    Row("head", "lm_head.weight", TRANSPOSE),
)

NORMS = (
    Row("attn_norm/scale", "input_layernorm.weight"),
    Row("ffn_norm/scale", "post_attention_layernorm.weight"),
)

ATTENTION = (
    Row("attn/w_q", "self_attn.q_proj.weight", TRANSPOSE),
    Row("attn/w_k", "self_attn.k_proj.weight", TRANSPOSE),
    Row("attn/w_v", "self_attn.v_proj.weight", TRANSPOSE),
    Row("attn/w_o", "self_attn.o_proj.weight", TRANSPOSE),
    Row("attn/b_q", "self_attn.q_proj.bias"),
    Row("attn/b_k", "self_attn.k_proj.bias"),
    Row("attn/b_v", "self_attn.v_proj.bias"),
    Row("attn/b_o", "self_attn.o_proj.bias"),
    Row("attn/q_norm/scale", "self_attn.q_norm.weight"),
    Row("attn/k_norm/scale", "self_attn.k_norm.weight"),
    Row("attn/sinks", "self_attn.sinks"),
)

LATENT_ATTENTION = (
    Row("attn/w_q", "self_attn.q_proj.weight", TRANSPOSE),
    Row("attn/w_q_a", "self_attn.q_a_proj.weight", TRANSPOSE),
    Row("attn/q_norm/scale", "self_attn.q_a_layernorm.weight"),
    Row("attn/w_q_b", "self_attn.q_b_proj.weight", TRANSPOSE),
    Row("attn/w_kv_a", "self_attn.kv_a_proj_with_mqa.weight", TRANSPOSE),
    Row("attn/kv_norm/scale", "self_attn.kv_a_layernorm.weight"),
    Row("attn/w_kv_b", "self_attn.kv_b_proj.weight", TRANSPOSE),
    Row("attn/w_o", "self_attn.o_proj.weight", TRANSPOSE),
)


def swiglu(path: str, hf: str) -> tuple[Row, ...]:
    """A gated FFN under `path`, with its biases; {expert} in `hf` makes it one for each expert."""
    parts = ("gate", "up", "down")
    return (
        *(Row(f"{path}/w_{p}", f"{hf}.{p}_proj.weight", TRANSPOSE) for p in parts),
        *(Row(f"{path}/b_{p}", f"{hf}.{p}_proj.bias") for p in parts),
    )


DENSE_FFN = swiglu("ffn", "mlp")
ROUTER = (Row("moe/router/kernel", "mlp.gate.weight", TRANSPOSE),)
EXPERTS = swiglu("moe/experts", "mlp.experts.{expert}")
# The experts of a layer as transformers 5 holds them in memory, and writes them if asked to.
FUSED_EXPERTS = (
    Row("moe/experts/w_gate", "mlp.experts.gate_up_proj", HALVES[0]),
    Row("moe/experts/w_up", "mlp.experts.gate_up_proj", HALVES[1]),
    Row("moe/experts/w_down", "mlp.experts.down_proj", TRANSPOSE),
)
EXPERTS += FUSED_EXPERTS
SHARED_EXPERTS = swiglu("moe/shared", "mlp.shared_experts")


def decoder(*rows: Row, others: tuple[Row, ...] = (), ignorable: tuple[str, ...] = ()) -> Table:
    """The table of a decoder with these rows in its blocks, norms before the sub-layers, and `others`."""
    return Table(
        (*DECODER, *in_blocks((*NORMS, *rows)), *others), (TIED_HEAD,), (ROTARY_BUFFER, *ignorable)
    )


def in_blocks(rows: tuple[Row, ...], blocks: tuple[str, ...] = ("dense_blocks", "moe_blocks")):
    """Rows of a block as rows of the model, in each of the named stacks of blocks."""
    return tuple(Row(f"{b}/{r.path}", BLOCK + r.hf, r.transform) for b in blocks for r in rows)

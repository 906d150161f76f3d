"""The tensors of published checkpoints, name by name, as a function of their config.json.

Written from the files' own headers and the original model classes, without moejax's name tables: what
the tables are tested against. `write` makes a random checkpoint with these tensors.
"""

import json

import jax.numpy as jnp
import numpy as np
import published_v4
from safetensors.numpy import save_file

BF16 = np.dtype(jnp.bfloat16)


def _ends(c):
    v, d = c["vocab_size"], c["hidden_size"]
    out = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not c.get("tie_word_embeddings"):
        out["lm_head.weight"] = (v, d)
    return out


def _norms(c):
    d = c["hidden_size"]
    return {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}


def _attention(c, bias=(), norms=None):
    """Grouped-query attention; `bias`: of which projections; `norms`: widths of q_norm and k_norm."""
    d, n = c["hidden_size"], c["num_attention_heads"]
    h = c.get("head_dim") or d // n
    m = c.get("num_key_value_heads") or n
    out = {
        "self_attn.q_proj.weight": (n * h, d),
        "self_attn.k_proj.weight": (m * h, d),
        "self_attn.v_proj.weight": (m * h, d),
        "self_attn.o_proj.weight": (d, n * h),
    }
    for p in bias:
        out[f"self_attn.{p}_proj.bias"] = out[f"self_attn.{p}_proj.weight"][:1]
    if norms == "head":
        out |= {"self_attn.q_norm.weight": (h,), "self_attn.k_norm.weight": (h,)}
    if norms == "full":
        out |= {"self_attn.q_norm.weight": (n * h,), "self_attn.k_norm.weight": (m * h,)}
    return out


def _latent_attention(c):
    d, n, r = c["hidden_size"], c["num_attention_heads"], c["kv_lora_rank"]
    rope, nope, v = c["qk_rope_head_dim"], c["qk_nope_head_dim"], c["v_head_dim"]
    out = {
        "self_attn.kv_a_proj_with_mqa.weight": (r + rope, d),
        "self_attn.kv_a_layernorm.weight": (r,),
        "self_attn.kv_b_proj.weight": (n * (nope + v), r),
        "self_attn.o_proj.weight": (d, n * v),
    }
    if q := c.get("q_lora_rank"):
        return out | {
            "self_attn.q_a_proj.weight": (q, d),
            "self_attn.q_a_layernorm.weight": (q,),
            "self_attn.q_b_proj.weight": (n * (nope + rope), q),
        }
    return out | {"self_attn.q_proj.weight": (n * (nope + rope), d)}


def _ffn(name, d, f):
    return {
        f"{name}.gate_proj.weight": (f, d),
        f"{name}.up_proj.weight": (f, d),
        f"{name}.down_proj.weight": (d, f),
    }


def _experts(c, count, width):
    d = c["hidden_size"]
    out = {"mlp.gate.weight": (count, d)}
    for e in range(count):
        out |= _ffn(f"mlp.experts.{e}", d, width)
    return out


def _model(c, layer):
    out = _ends(c)
    for i in range(c["num_hidden_layers"]):
        out |= {f"model.layers.{i}.{name}": shape for name, shape in layer(i).items()}
    return out


def _deepseek_ffn(c, i):
    d, f = c["hidden_size"], c["moe_intermediate_size"]
    if i < c["first_k_dense_replace"]:
        return _ffn("mlp", d, c["intermediate_size"])
    out = _experts(c, c["n_routed_experts"], f)
    if c.get("topk_method") == "noaux_tc" or c["model_type"] == "glm4_moe":
        out["mlp.gate.e_score_correction_bias"] = (c["n_routed_experts"],)
    return out | _ffn("mlp.shared_experts", d, f * c["n_shared_experts"])


def llama(c):
    d, f = c["hidden_size"], c["intermediate_size"]
    bias = "qkvo" if c.get("attention_bias") else ""
    return _model(c, lambda i: _norms(c) | _attention(c, bias) | _ffn("mlp", d, f))


def deepseek(c):
    return _model(c, lambda i: _norms(c) | _attention(c) | _deepseek_ffn(c, i))


def deepseek_v2(c):
    return _model(c, lambda i: _norms(c) | _latent_attention(c) | _deepseek_ffn(c, i))


def deepseek_v3(c):
    return _with_mtp(c, lambda i: _norms(c) | _latent_attention(c) | _deepseek_ffn(c, i))


def deepseek_v32(c):
    q, d, n, width = (
        c[k] for k in ("q_lora_rank", "hidden_size", "index_n_heads", "index_head_dim")
    )
    indexer = {
        "self_attn.indexer.wq_b.weight": (n * width, q),
        "self_attn.indexer.wk.weight": (width, d),
        "self_attn.indexer.k_norm.weight": (width,),
        "self_attn.indexer.k_norm.bias": (width,),
        "self_attn.indexer.weights_proj.weight": (n, d),
    }
    types = c.get("indexer_types") or []

    def layer(i):
        shared = i < len(types) and types[i] == "shared"
        own = {} if shared else indexer
        return _norms(c) | _latent_attention(c) | own | _deepseek_ffn(c, i)

    return _with_mtp(c, layer)


def glm_moe_dsa(c):
    return deepseek_v32(c)


def glm4_moe(c):
    bias = "qkv" if c["attention_bias"] else ""
    attention = _attention(c, bias, "head" if c["use_qk_norm"] else None)
    return _with_mtp(c, lambda i: _norms(c) | attention | _deepseek_ffn(c, i))


def _with_mtp(c, layer_of):
    out = _model(c, layer_of)
    v, d, last = c["vocab_size"], c["hidden_size"], c["num_hidden_layers"]
    for i in range(last, last + (c.get("num_nextn_predict_layers") or 0)):
        layer = layer_of(i) | {
            "embed_tokens.weight": (v, d),
            "enorm.weight": (d,),
            "hnorm.weight": (d,),
            "eh_proj.weight": (d, 2 * d),
            "shared_head.norm.weight": (d,),
            "shared_head.head.weight": (v, d),
        }
        out |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return out


def mixtral(c):
    d, f = c["hidden_size"], c["intermediate_size"]
    moe = {"block_sparse_moe.gate.weight": (c["num_local_experts"], d)}
    for e in range(c["num_local_experts"]):
        name = f"block_sparse_moe.experts.{e}"
        moe |= {f"{name}.w1.weight": (f, d), f"{name}.w3.weight": (f, d)}
        moe |= {f"{name}.w2.weight": (d, f)}
    return _model(c, lambda i: _norms(c) | _attention(c) | moe)


def qwen2_moe(c):
    d, f = c["hidden_size"], c["shared_expert_intermediate_size"]
    moe = _experts(c, c["num_experts"], c["moe_intermediate_size"])
    moe |= _ffn("mlp.shared_expert", d, f) | {"mlp.shared_expert_gate.weight": (1, d)}
    dense = _ffn("mlp", d, c["intermediate_size"])
    only = c.get("mlp_only_layers") or []
    return _model(c, lambda i: _norms(c) | _attention(c, "qkv") | (dense if i in only else moe))


def qwen3_moe(c):
    moe = _experts(c, c["num_experts"], c["moe_intermediate_size"])
    return _model(c, lambda i: _norms(c) | _attention(c, norms="head") | moe)


def olmoe(c):
    moe = _experts(c, c["num_experts"], c["intermediate_size"])
    return _model(c, lambda i: _norms(c) | _attention(c, norms="full") | moe)


def gpt_oss(c):
    d, f, e = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    rest = {
        "self_attn.sinks": (c["num_attention_heads"],),
        "mlp.router.weight": (e, d),
        "mlp.router.bias": (e,),
        "mlp.experts.gate_up_proj": (e, d, 2 * f),
        "mlp.experts.gate_up_proj_bias": (e, 2 * f),
        "mlp.experts.down_proj": (e, f, d),
        "mlp.experts.down_proj_bias": (e, d),
    }
    return _model(c, lambda i: _norms(c) | _attention(c, "qkvo") | rest)


def granitemoe(c):
    d, f, e = c["hidden_size"], c["intermediate_size"], c["num_local_experts"]
    moe = {
        "block_sparse_moe.router.layer.weight": (e, d),
        "block_sparse_moe.input_linear.weight": (e, 2 * f, d),
        "block_sparse_moe.output_linear.weight": (e, d, f),
    }
    return _model(c, lambda i: _norms(c) | _attention(c) | moe)


def gpt2(c):
    d = c["n_embd"]
    out = {"wte.weight": (c["vocab_size"], d), "wpe.weight": (c["n_positions"], d)}
    out |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    for i in range(c["n_layer"]):
        for name, shape in (
            ("ln_1", (d,)),
            ("ln_2", (d,)),
            ("attn.c_attn", (d, 3 * d)),
            ("attn.c_proj", (d, d)),
            ("mlp.c_fc", (d, 4 * d)),
            ("mlp.c_proj", (4 * d, d)),
        ):
            out |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    return {f"transformer.{name}": shape for name, shape in out.items()}


FAMILIES = {
    f.__name__: f
    for f in (
        *(llama, deepseek, deepseek_v2, deepseek_v3, mixtral),
        *(qwen2_moe, qwen3_moe, olmoe, gpt_oss, gpt2, granitemoe, glm4_moe),
        *(deepseek_v32, glm_moe_dsa, published_v4.deepseek_v4),
    )
}

# --------------------------------------------------------------------------------------------------
# Small configs, with odd sizes, of every family.

_BASE = dict(
    vocab_size=41, hidden_size=12, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, intermediate_size=20, max_position_embeddings=64, rms_norm_eps=1e-5,
    rope_theta=1e4,
)  # fmt: skip
_MLA = dict(
    num_key_value_heads=4, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
    q_lora_rank=None,
)  # fmt: skip
_DEEPSEEK = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=7, n_shared_experts=2,
    first_k_dense_replace=1, scoring_func="softmax",
)  # fmt: skip
_INDEXED = dict(
    scoring_func="sigmoid", q_lora_rank=8, topk_method="noaux_tc", routed_scaling_factor=2.5,
    num_nextn_predict_layers=1, index_n_heads=16, index_head_dim=7, index_topk=5,
)  # fmt: skip
_QWEN = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=7)

CONFIGS = {
    "llama": {**_BASE, "head_dim": 6, "attention_bias": True},
    "deepseek": {**_BASE, **_DEEPSEEK, "hidden_size": 16},
    "deepseek_v2": {**_BASE, **_MLA, **_DEEPSEEK},
    "deepseek_v3": {
        **_BASE, **_MLA, **_DEEPSEEK, "scoring_func": "sigmoid", "q_lora_rank": 8,
        "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1, "num_nextn_predict_layers": 2,
        "routed_scaling_factor": 2.5,
    },
    "deepseek_v32": {**_BASE, **_MLA, **_DEEPSEEK, **_INDEXED, "n_group": 2, "topk_group": 1},
    "glm_moe_dsa": {
        **_BASE, **_MLA, **_DEEPSEEK, **_INDEXED, "n_group": 1, "topk_group": 1,
        "indexer_types": ["full", "shared", "full"],
    },
    "deepseek_v4": published_v4.CONFIG,
    "mixtral": {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 4},
    "qwen2_moe": {
        **_BASE, **_QWEN, "head_dim": 4, "shared_expert_intermediate_size": 9,
        "mlp_only_layers": [0], "tie_word_embeddings": True,
    },
    "qwen3_moe": {**_BASE, **_QWEN, "head_dim": 6},
    "olmoe": {**_BASE, "num_experts": 4, "num_experts_per_tok": 2, "hidden_size": 16},
    "gpt_oss": {
        **_BASE, "head_dim": 6, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 8,
    },
    "glm4_moe": {
        **_BASE, **_DEEPSEEK, "scoring_func": "sigmoid", "head_dim": 8, "use_qk_norm": True,
        "attention_bias": True, "num_nextn_predict_layers": 1, "routed_scaling_factor": 2.5,
    },
    "granitemoe": {
        **_BASE, "num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": True,
        "embedding_multiplier": 12.0, "attention_multiplier": 0.3, "residual_multiplier": 0.22,
        "logits_scaling": 6.0, "head_dim": 6,
    },
    "gpt2": {"vocab_size": 41, "n_embd": 12, "n_head": 4, "n_layer": 2, "n_positions": 16},
}  # fmt: skip


def random_tensors(config, seed=0, dtype=BF16):
    """Normal values for every published tensor; copies that must be equal are. Biases of the selection
    are float32 in the published files."""
    rng = np.random.default_rng(seed)
    shapes = FAMILIES[config["model_type"]](config)
    out = {n: rng.standard_normal(s, np.float32).astype(dtype) for n, s in shapes.items()}
    for name in out:
        if name.endswith(("e_score_correction_bias", "ffn.gate.bias")):
            out[name] = out[name].astype(np.float32)
        if name.endswith("tid2eid"):  # a token's experts are distinct
            tokens, k = out[name].shape
            draws = rng.random((tokens, config["n_routed_experts"])).argsort(axis=1)
            out[name] = draws[:, :k].astype(np.int32)
        if name.endswith(".embed_tokens.weight"):
            out[name] = out["model.embed_tokens.weight"]
        if name.endswith(".shared_head.head.weight"):
            out[name] = out["lm_head.weight"]
    return out


def fused(tensors):
    """The experts of every layer in two tensors, [E, 2F, D] and [E, D, F], as transformers 5 holds them."""
    out, experts = {}, {}
    for name, value in tensors.items():
        layer, is_expert, rest = name.partition(".mlp.experts.")
        if not is_expert:
            out[name] = value
            continue
        expert, part, _ = rest.split(".")
        experts.setdefault(layer + is_expert[:-1], {})[int(expert), part] = value
    for name, of in experts.items():
        count = 1 + max(e for e, _ in of)
        both = [np.concatenate([of[e, "gate_proj"], of[e, "up_proj"]]) for e in range(count)]
        out[name + ".gate_up_proj"] = np.stack(both)
        out[name + ".down_proj"] = np.stack([of[e, "down_proj"] for e in range(count)])
    return out


def config(family):
    return {"model_type": family, **CONFIGS[family]}


def write(folder, config, tensors, shards=1):
    """config.json and the tensors, in one file or, in turn, in several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {n: t for j, (n, t) in enumerate(tensors.items()) if j % shards == i}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))

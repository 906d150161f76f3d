"""The original models: small, random, on the CPU, in float32, and saved as they are published."""

import contextlib
import json
import pathlib
import zlib

import parity_v4
import torch
import transformers
from parity_cases import BASE
from parity_shapes import Case
from safetensors.torch import load_file, save_file
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other

# The plain loops: no fused attention, no grouped matmul.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
# transformers has no class for Kimi K2; it is DeepSeek-V3 by another name.
CLASS_OF = {"kimi_k2": "deepseek_v3"}


def build(case: Case) -> torch.nn.Module:
    """The original model of a case, with random weights."""
    keys = {**BASE[case.family], **case.config}
    if case.family == "deepseek":
        model = deepseek_moe(keys)
    else:
        config = transformers.AutoConfig.for_model(CLASS_OF.get(case.family, case.family), **keys)
        model = transformers.AutoModelForCausalLM.from_config(config, **EAGER)
    randomise(model.eval(), seed=zlib.crc32(case.id.encode()))
    return model


def deepseek_moe(keys: dict) -> torch.nn.Module:
    """DeepSeekMoE (2401.06066), which transformers lacks: LLaMA with DeepSeek-V2's MoE block.

    V1's layer is V2's in greedy mode without scaling; attention and dense layers are LLaMA's.
    """
    llama = {k: v for k, v in keys.items() if hasattr(transformers.LlamaConfig(), k)}
    rope = {"rope_type": "default", "rope_theta": keys.get("rope_theta", 10_000.0)}
    config = transformers.LlamaConfig(**llama, rope_parameters=rope, **EAGER)
    model = transformers.LlamaForCausalLM(config)
    moe = transformers.DeepseekV2Config(
        hidden_size=keys["hidden_size"],
        num_attention_heads=keys["num_attention_heads"],
        n_routed_experts=keys["n_routed_experts"],
        num_experts_per_tok=keys["num_experts_per_tok"],
        moe_intermediate_size=keys["moe_intermediate_size"],
        n_shared_experts=keys["n_shared_experts"],
        topk_method="greedy",
        routed_scaling_factor=1.0,
        **EAGER,
    )
    for layer in model.model.layers[keys["first_k_dense_replace"] :]:
        layer.mlp = DeepseekV2Moe(moe)
    return model


def randomise(model: torch.nn.Module, seed: int, config=None):
    """Weights that keep activations and logits near 1, spread the routes, and leave no term unused.

    Norm scales are not 1, biases, sinks and selection biases not 0.
    """
    g = torch.Generator().manual_seed(seed)
    config = config or model.config
    tied = config.tie_word_embeddings
    named = dict(model.named_parameters())
    buffers = ("e_score_correction_bias", "tid2eid")
    named |= {k: v for k, v in model.named_buffers() if k.endswith(buffers)}
    with torch.no_grad():
        for name, p in named.items():
            noise = torch.randn(p.shape, generator=g)
            leaf = name.split(".")[-2]
            if name.endswith("sinks"):
                p.copy_(noise)
            elif name.endswith("tid2eid"):  # experts of a token are distinct
                experts = torch.rand((len(p), config.n_routed_experts), generator=g).argsort(dim=1)
                p.copy_(experts[:, : p.shape[1]])
            elif "_hc." in name or "hc_head" in name:  # mixing matrices far from uniform
                fn, scale = name.endswith("fn"), name.endswith("scale")
                p.copy_(noise * p.shape[-1] ** -0.5 if fn else 0.5 * noise + scale)
            elif name.endswith("e_score_correction_bias"):
                p.copy_(0.5 * noise)  # some biased scores are negative
            elif "norm" in leaf or leaf.startswith("ln_"):
                p.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
            elif name.endswith("bias"):
                p.copy_(0.3 * noise)
            elif leaf in ("embed_tokens", "wte", "wpe"):
                p.copy_(noise * (p.shape[1] ** -0.5 if tied else 1.0))
            else:
                # Linear is [out, in]; GPT-2's Conv1D and gpt-oss's experts are [.., in, out].
                in_first = "transformer.h." in name or (
                    p.ndim == 3 and "gpt_oss" in config.model_type
                )
                gain = 3.0 if leaf in ("gate", "router") else 1.0
                p.copy_(noise * gain * p.shape[-2 if in_first else -1] ** -0.5)


def save(model: torch.nn.Module, case: Case, path: pathlib.Path):
    """Write `model` as its family is published."""
    if case.family == "deepseek":
        _save_deepseek(model, case, path)
        return
    if case.family == "deepseek_v4" and not case.shard:
        parity_v4.save(model, {**BASE[case.family], **case.config}, case.name, path)
        return
    model.save_pretrained(path, **({"max_shard_size": case.shard} if case.shard else {}))
    if case.family in CLASS_OF:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_type": case.family}))


def load(case: Case, path: pathlib.Path) -> torch.nn.Module:
    """Read a directory of that family back."""
    if case.family == "deepseek":
        model = build(case)
        tensors = {}
        for file in sorted(path.glob("*.safetensors")):
            tensors |= load_file(file)
        model.load_state_dict(_fuse(tensors, model), strict=True)
        return model
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, **EAGER
    ).eval()


def _save_deepseek(model, case: Case, path: pathlib.Path):
    keys = {**BASE["deepseek"], **case.config}
    path.mkdir()
    config = {"model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], **keys}
    (path / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, value in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, fused in enumerate(value):
                for part, w in zip(("gate_proj", "up_proj"), fused.chunk(2)):
                    tensors[name.replace("gate_up_proj", f"{e}.{part}.weight")] = w.contiguous()
        elif name.endswith("experts.down_proj"):
            for e, w in enumerate(value):
                tensors[name.replace("down_proj", f"{e}.down_proj.weight")] = w.contiguous()
        elif not (name == "lm_head.weight" and keys.get("tie_word_embeddings")):
            tensors[name] = value
    if not case.shard:
        save_file(tensors, path / "model.safetensors")
        return
    names = sorted(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, path / file)
    weight_map = {n: file for file, part in files.items() for n in part}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def _fuse(tensors: dict, model) -> dict:
    """The published names of DeepSeekMoE as the state dict of `deepseek_moe`."""
    state = {k: v for k, v in tensors.items() if ".experts." not in k}
    for name, want in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            part = lambda e, p, n=name: tensors[n.replace("gate_up_proj", f"{e}.{p}.weight")]  # noqa: E731
            state[name] = torch.stack(
                [torch.cat([part(e, "gate_proj"), part(e, "up_proj")]) for e in range(len(want))]
            )
        elif name.endswith("experts.down_proj"):
            state[name] = torch.stack(
                [
                    tensors[name.replace("down_proj", f"{e}.down_proj.weight")]
                    for e in range(len(want))
                ]
            )
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


@contextlib.contextmanager
def watch_routes(model):
    """Collects each MoE layer's chosen experts [T, K], in order of layers."""
    seen, hooks = [], []
    for _, module in model.named_modules():
        if type(module).__name__.lower().endswith(("topkrouter", "hashrouter", "gate")):
            hooks.append(module.register_forward_hook(lambda m, i, out: seen.append(out[2])))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()

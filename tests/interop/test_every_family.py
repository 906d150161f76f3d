"""Every family from outside, in sequence: import, generate, evaluate, routes, export. Small, random values."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from test_import_export import VOCAB, write_tokenizer

from moejax.__main__ import main
from moejax.interop.save import write_folder
from moejax.models import transformer, zoo
from moejax.params import init_params

LAYERS = 4
# Of a published config.json: key -> a small size; whatever else it says stays.
SMALL = {
    **dict.fromkeys(("hidden_size", "n_embd"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("head_dim", "attention_head_dim", "swa_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("v_head_dim", "swa_v_head_dim"), 6),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("intermediate_size", "n_inner", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size"), 8),
    **dict.fromkeys(("index_n_heads", "index_topk"), 4),
    **{"moe_intermediate_size": 8, "index_head_dim": 8, "o_groups": 2, "vocab_size": VOCAB},
    **{"n_group": 2, "topk_group": 1, "moe_layer_end_index": LAYERS - 1, "max_window_layers": 2},
}
AT_MOST = {"first_k_dense_replace": 1, "num_shared_expert": 1, "num_hash_layers": 1}
LEFT_OUT = ("quantization_config", "auto_map", "_note", "_training", "bos_token_id", "pad_token_id")


def small(hf: dict) -> dict:
    """A published config.json with small sizes; lists of layers are cut to the first ones."""
    out = {}
    for key, value in hf.items():
        if isinstance(value, list) and len(value) > LAYERS and key != "architectures":
            value = value[:LAYERS]
        if isinstance(value, list) and key in SMALL | AT_MOST:
            value = value[0]
        if key in SMALL and value is not None and key not in ("n_group", "topk_group"):
            value = SMALL[key]
        if key in AT_MOST and value is not None:
            value = min(value, AT_MOST[key])
        if key not in LEFT_OUT:
            out[key] = value
    if (hf.get("n_group") or 1) > 1:
        out |= {k: min(SMALL[k], hf[k]) for k in ("n_group", "topk_group")}
    heads, kv = hf.get("num_attention_heads"), hf.get("num_key_value_heads")
    if kv is not None:
        out["num_key_value_heads"] = 4 if kv == heads else 1 if kv == 1 else 2
    if hf.get("swa_num_key_value_heads"):
        out["swa_num_key_value_heads"] = 2 * out["num_key_value_heads"]
    if isinstance(hf.get("moe_intermediate_size"), list):  # Hunyuan's, which must be the other one
        out["moe_intermediate_size"] = out["intermediate_size"]
    return {**out, "eos_token_id": 0, "torch_dtype": "float32"}


ONE_OF = {}  # the first preset of every family
for _name in zoo.PRESETS:
    ONE_OF.setdefault(zoo.load_hf(_name)["model_type"], _name)


@pytest.mark.product
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_in_sequence(tmp_path, capsys, family):
    hf = small(zoo.load_hf(ONE_OF[family]))
    cfg = zoo.config_from_hf(hf)
    params = init_params(transformer.param_specs(cfg), jax.random.key(0))
    folder, run, back = tmp_path / "hf", tmp_path / "run", tmp_path / "back"
    state = transformer.init_router_state(cfg)
    config = json.dumps(hf).encode()
    write_folder(folder, cfg, params, state, family, extra_files={"config.json": config})
    write_tokenizer(folder)
    (tmp_path / "text.txt").write_text("hello world, hello.\n\n" * 20)

    assert main(["import", f"--hf_dir={folder}", f"--workdir={run}"]) == 0
    out = capsys.readouterr().out
    assert family in out and "missing" in out
    here = f"--workdir={run}"
    assert main(["generate", here, "--prompt=hello", "--max_new=12", "--temperature=0"]) == 0
    assert (
        main(
            ["evaluate", here, f"--sources=t={tmp_path}/text.txt", "--seq_len=24", "--batch_size=2"]
        )
        == 0
    )
    assert "bits per byte" in capsys.readouterr().out
    if cfg.num_moe_layers:
        assert main(["routes", here, "--text=hello world", f"--out={tmp_path}/r.jsonl"]) == 0
        assert (tmp_path / "r.jsonl").read_text().count("\n") > 2
    assert main(["export", here, f"--hf_dir={back}"]) == 0
    before, after = (
        {n: a for f in d.glob("*.safetensors") for n, a in load_file(f).items()}
        for d in (folder, back)
    )
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert json.loads((back / "config.json").read_text()) == json.loads(config)

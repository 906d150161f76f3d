"""DeepSeek-V3's multi-token prediction module against the one of `transformers`.

The comparison is of depth 1, all that was ever released; deeper chains have no original to compare with
(tests/models/test_deepseek_oracle.py has the paper's equations).
"""

import jax
import numpy as np
import parity_oracle as oracle
import pytest
import torch
from parity_shapes import GROUPS, Case, yarn
from safetensors.torch import load_file, save_file
from transformers.modeling_layers import MtpModel

from moejax.config import ComputeConfig
from moejax.interop.load import load_model
from moejax.interop.save import write_folder
from moejax.models import transformer
from moejax.models.blocks import Context, locate
from moejax.models.mtp import mtp_step

CASES = [
    Case(
        "deepseek_v3",
        "mtp-groups-yarn",
        {
            "q_lora_rank": 14,
            "num_nextn_predict_layers": 1,
            **GROUPS,
            **yarn(40.0, mscale=1.0, mscale_all_dim=1.0),
        },
    ),
    Case(
        "deepseek_v3",
        "mtp-one-group",
        {
            "q_lora_rank": None,
            "num_nextn_predict_layers": 1,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
        },
    ),
]
TOKENS = np.random.default_rng(3).integers(0, 101, (3, 13))


def save_with_mtp(main, mtp, case: Case, path):
    """The published layout: the module is a layer after the last, with copies of embedding and head."""
    oracle.save(main, case, path)
    tensors = load_file(path / "model.safetensors")
    new = f"model.layers.{main.config.num_hidden_layers}."
    for name, value in mtp.layers[0].state_dict().items():
        name = new + name.removeprefix("mtp_block.").replace("post_norm", "shared_head.norm")
        if ".experts." in name:
            parts = ("down_proj",) if "down" in name else ("gate_proj", "up_proj")
            stem = name.rsplit(".", 1)[0]
            for e, fused in enumerate(value):
                for part, w in zip(parts, fused.chunk(len(parts))):
                    tensors[f"{stem}.{e}.{part}.weight"] = w.contiguous()
        else:
            tensors[name] = value
    tensors[new + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[new + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def original_logits(main, mtp):
    """Logits of depth 1 for positions 0 .. S-2, each given the next token, and the chosen experts."""
    with torch.no_grad():
        tokens = torch.tensor(TOKENS)
        hidden = main(tokens, output_hidden_states=True).hidden_states[-1]
        positions = torch.arange(1, TOKENS.shape[1]).expand(3, -1)
        with oracle.watch_routes(mtp) as routes:
            h = mtp.forward_layer(0, hidden[:, :-1], positions, None, input_ids=tokens[:, 1:])
        return main.lm_head(h).numpy(), np.sort(routes[0].numpy(), axis=-1)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_mtp(case, record, record_one, tmp_path):
    main = oracle.build(case)
    mtp = MtpModel(main, 1).eval()
    oracle.randomise(mtp.layers, seed=5, config=main.config)
    save_with_mtp(main, mtp, case, tmp_path / "original")
    want, want_routes = original_logits(main, mtp)

    cfg, params, state = load_model(tmp_path / "original")
    assert cfg.mtp_depth == 1

    @jax.jit
    def logits(tokens, next_tokens):
        hidden = transformer.forward(params, state, tokens, cfg).hidden_BSD
        first = lambda tree: jax.tree.map(lambda a: a[0], tree)  # noqa: E731
        ctx = Context(cfg=cfg, compute=ComputeConfig(), where=locate(tokens, cfg))
        _, normed, _, aux, _ = mtp_step(
            params, first(params["mtp"]), 0, first(state["mtp"]), hidden, next_tokens, ctx
        )
        assert aux is not None  # a layer with experts
        return transformer.logits(params, normed), aux.routing.expert_index_TK

    got, routes = logits(TOKENS[:, :-1].astype(np.int32), TOKENS[:, 1:].astype(np.int32))
    np.testing.assert_array_equal(np.sort(routes, axis=-1), want_routes)
    difference = np.abs(np.asarray(got) - want).max()
    record("deepseek_v3 (MTP)", "logits", difference)
    record_one("deepseek_v3 (MTP)", "routes equal", want_routes.size)
    record_one("deepseek_v3 (MTP)", "configurations")
    assert difference <= 1e-4  # float32 at logit scale 1, four blocks deep

    write_folder(tmp_path / "export", cfg, params, state, case.family)
    again = oracle.load(case, tmp_path / "export")
    # transformers looks for the module in layer 61, where V3 has it.
    again._keys_to_ignore_on_load_unexpected = [rf"layers\.{main.config.num_hidden_layers}\."]
    module = MtpModel.from_pretrained(again).eval()
    for name, value in mtp.layers.state_dict().items():
        assert torch.equal(value, module.layers.state_dict()[name]), name
    # torch sums in another order where a tensor begins elsewhere in memory.
    np.testing.assert_allclose(original_logits(again, module)[0], want, atol=1e-5)

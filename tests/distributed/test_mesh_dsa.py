"""Sparse attention on a mesh: the indexer's heads are split like those of attention; a step is one device's."""

import pytest
from mesh_case import assert_same, config, layout_of, oracle, run

from moejax.models import transformer
from moejax.params import by_path

MESH = dict(data=2, fsdp=2, tensor=2)
DSA = dict(
    kind="dsa", q_lora_rank=4, kv_lora_rank=4, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=4,
    index_heads=16, index_head_dim=4, index_topk=2, index_shared_at=(1,), mtp=1,
    index_loss=0.5,
)  # fmt: skip


def test_heads_of_the_indexer_are_split():
    cfg = config(mesh=MESH, **DSA)
    layout = layout_of(cfg)
    assert layout is not None
    specs = by_path(transformer.param_specs(cfg.model)["indexed_attn"]["indexer"])
    assert [tuple(layout.spec(*specs[n].axes))[-1] for n in ("w_q", "w_heads")] == ["tensor"] * 2


@pytest.mark.product
def test_a_step():
    assert_same(run(mesh=MESH, remat="full", accumulation=2, **DSA), oracle(**DSA))

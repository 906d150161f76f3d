"""Generation on a mesh of 8 devices says what one device says, with the cache laid out over them."""

import jax
import pytest

from moejax.config import (
    AttentionConfig,
    ConfigError,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
)
from moejax.evals.generate import generate
from moejax.evals.writer import mesh_layout
from moejax.models import transformer
from moejax.models.cache import init_cache, place
from moejax.params import init_params
from moejax.routers import router_options

CFG = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    d_ff=32,
    max_seq_len=32,
    init_std=0.3,
    mtp_depth=1,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    moe=MoEConfig(
        num_experts=8, experts_per_token=2, d_expert=8, router=router_options(expert_bias=True)
    ),
)
# Three rows over two, four or eight shards of the batch: idle rows fill it up.
PROMPTS = [[3, 7, 1, 30, 2], [5, 9], [11]]


@pytest.fixture(scope="module")
def model():
    params = init_params(transformer.param_specs(CFG), jax.random.key(0))
    return params, transformer.init_router_state(CFG)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(*model, CFG, PROMPTS, 6)


@pytest.mark.parametrize(
    "mesh, speculative", [("data=2,expert=2,tensor=2", True), ("fsdp=2,expert=4", False)]
)
def test_the_text_of_one_device(model, greedy, mesh, speculative):
    """float32 sums are split differently; random weights leave no ties near enough to notice."""
    layout = mesh_layout(ExperimentConfig(model=CFG), mesh)
    params = jax.device_put(model[0], layout.of_specs(transformer.param_specs(CFG)))
    w_up = params["moe_blocks"]["moe"]["experts"]["w_up"]
    assert w_up.addressable_shards[0].data.size == w_up.size // (8 if "tensor" not in mesh else 4)
    router_state = jax.device_put(model[1], layout.replicated)
    options = dict(layout=layout, speculative_decoding=speculative)
    assert generate(params, router_state, CFG, PROMPTS, 6, **options) == greedy


def test_the_cache_is_laid_out_over_rows_and_heads():
    layout = mesh_layout(ExperimentConfig(model=CFG), "data=2,expert=2,tensor=2")
    cache = jax.jit(lambda: place(init_cache(CFG, 4, 16), CFG, layout))()
    for a in cache["all"].values():
        # [L,B,M,S,H]: rows over data and expert, key/value heads over tensor.
        assert a.addressable_shards[0].data.shape == (2, 1, 1, 16, 8)


def test_meshes_that_do_not_fit_are_refused():
    cfg = ExperimentConfig(model=CFG)
    with pytest.raises(ConfigError, match=r"expert=3.*may be 1, 2, 4 or 8"):
        mesh_layout(cfg, "expert=3")
    with pytest.raises(ConfigError, match="needs 16 devices, there are 8"):
        mesh_layout(cfg, "tensor=2,expert=8")
    assert mesh_layout(cfg, "tensor=1") is None

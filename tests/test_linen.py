"""The Linen shells hold the functions' parameters and return the functions' values."""

import jax
import numpy as np
from flax import linen as nn

from moejax.config import AttentionConfig, ModelConfig, MoEConfig
from moejax.linen import MoELayer, Transformer
from moejax.models import transformer
from moejax.moe.layer import moe
from moejax.params import abstract_params, map_specs
from moejax.routers import router_options

CFG = ModelConfig(
    vocab_size=16,
    d_model=8,
    num_layers=2,
    num_dense_layers=1,
    d_ff=8,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=4),
    moe=MoEConfig(
        num_experts=4,
        experts_per_token=2,
        d_expert=4,
        shared_experts=1,
        router=router_options(expert_bias=True),
    ),
)


def test_transformer():
    tokens = np.arange(8, dtype=np.int32).reshape(1, 8)
    module = Transformer(CFG)
    boxed = module.init(jax.random.key(0), tokens)
    assert set(boxed) == {"params"}  # nothing but parameters
    params = nn.unbox(boxed["params"])
    specs = transformer.param_specs(CFG)
    assert jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params) == (
        abstract_params(specs)
    )
    axes = nn.get_partition_spec(boxed)["params"]
    assert axes == map_specs(lambda s: jax.sharding.PartitionSpec(*s.axes), specs)
    logits, out = module.apply(boxed, tokens)
    state = transformer.init_router_state(CFG)
    want = transformer.forward(params, state, tokens, CFG)
    np.testing.assert_array_equal(out.hidden_BSD, want.hidden_BSD)
    np.testing.assert_array_equal(logits, transformer.logits(params, want.hidden_BSD))
    other = nn.unbox(module.init(jax.random.key(1), tokens)["params"])
    assert not np.allclose(other["embed"]["tokens"], params["embed"]["tokens"])


def test_layer_inside_another_module():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x_BSD, router_state):
            y_BSD, aux = MoELayer(CFG, name="moe")(nn.RMSNorm()(x_BSD), router_state)
            return x_BSD + y_BSD, aux

    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    state = {"expert_bias": np.array([0, 0, 0, 9], np.float32)}
    block = Block()
    variables = block.init(jax.random.key(1), x, state)
    y, aux = block.apply(variables, x, state)
    params = nn.unbox(variables["params"])
    normed = nn.RMSNorm().apply({"params": params["RMSNorm_0"]}, x)
    want, _ = moe(params["moe"], state, normed, CFG)
    np.testing.assert_array_equal(y, x + want)
    assert aux.stats["load"][3] == 4  # the bias that was passed in steered every token

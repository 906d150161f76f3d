"""The public face: every name is there, and importing moejax alone loads no JAX."""

import subprocess
import sys

import moejax


def test_every_name_is_there():
    for name in moejax.__all__:
        assert getattr(moejax, name) is not None
    assert set(moejax.__all__) == set(moejax._HOMES)


def test_the_package_and_help_load_no_jax():
    code = "import moejax, moejax.__main__, sys; assert 'jax' not in sys.modules, 'jax was loaded'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_notebook_gets_far_with_it():
    import jax
    import jax.numpy as jnp

    from moejax import ModelConfig, MoEConfig, forward, generate, init_model, logits, router_options

    moe = MoEConfig(num_experts=4, d_expert=16, router=router_options(score="sigmoid"))
    cfg = ModelConfig(vocab_size=64, d_model=32, num_layers=2, moe=moe)
    params, state = init_model(cfg, jax.random.key(0))
    out = forward(params, state, jnp.zeros((2, 8), jnp.int32), cfg)
    assert logits(params, out.hidden_BSD).shape == (2, 8, 64)
    assert out.aux["moe_blocks"].stats["load"].sum() == 2 * 8 * 2  # tokens times K, one MoE layer
    assert len(generate(params, state, cfg, [[1, 2, 3]], 4)[0]) == 4

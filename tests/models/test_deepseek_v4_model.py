"""DeepSeek-V4 whole, at toy size: layers of every kind, streams, hash tables, multi-token prediction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moejax.config import ComputeConfig
from moejax.data import synthetic_batch
from moejax.evals.generate import generate
from moejax.models import transformer
from moejax.models.loss import loss_fn
from tests.flat import experiment

CFG = experiment(
    vocab_size=32, d_model=16, num_layers=4, num_dense_layers=0, mtp_depth=1, init_std=0.2,
    router="deepseek_v4_hash", hash_layers=1, num_experts=4, experts_per_token=2, d_expert=8,
    shared_experts=1, moe_activation="swiglu_clamped", activation_limit=1.0,
    count=2, sinkhorn_steps=3, bias_update="sign", sequence_loss=1e-2,
    kind="compressed", num_heads=2, head_dim=8, q_lora_rank=6, qk_rope_head_dim=4, interleaved=True,
    layer_kinds=("sliding", "csa", "hca", "csa"), sliding_window=4, csa_rate=2, hca_rate=4, o_groups=2,
    o_lora_rank=5, index_heads=16, index_head_dim=6, index_topk=3, seq_len=16, batch_size=4,
)  # fmt: skip
MODEL = CFG.model


@functools.cache
def model():
    """Biases, sinks and scales away from where they begin."""
    params, state = transformer.init_model(MODEL, jax.random.key(0))
    noise = np.random.default_rng(1)
    shake = lambda a: a + 0.3 * noise.normal(size=a.shape)  # noqa: E731
    params = jax.tree.map(lambda a: shake(a).astype("float32") if a.ndim < 4 else a, params)
    return params, state


@pytest.mark.parametrize("speculative", [False, True])
@pytest.mark.product
def test_generated_text_is_the_greedy_one(speculative):
    """Prompts of 1, 5 and 14 tokens in one batch, through every cache, for 20 tokens; guessed ones too.
    float64, so that no token is a matter of rounding."""
    params, state = model()
    prompts = [np.random.default_rng(n).integers(0, 32, n).tolist() for n in (1, 5, 14)]
    compute = ComputeConfig(dtype="float64")
    with jax.enable_x64():
        wide = jax.tree.map(lambda a: jnp.asarray(a, "float64"), params)
        rows = generate(
            wide, state, MODEL, prompts, 20, compute=compute, speculative_decoding=speculative
        )

        @jax.jit
        def logits(tokens):
            out = transformer.forward(wide, state, tokens, MODEL, compute=compute)
            return transformer.logits(wide, out.hidden_BSD)

        width = max(map(len, prompts)) + 20
        whole = np.array([(p + r + [0] * width)[:width] for p, r in zip(prompts, rows)])
        best = np.asarray(logits(jnp.asarray(whole))).argmax(axis=-1)
    for prompt, row, guess in zip(prompts, rows, best):
        assert row == guess[len(prompt) - 1 : len(prompt) + 19].tolist()


@pytest.mark.product
def test_it_learns():
    """60 steps of Adam on one batch; the table of the hash layer stands still, and the biases move."""
    params, state = transformer.init_model(MODEL, jax.random.key(0))
    batch = jax.tree.map(jnp.asarray, synthetic_batch(16, 4, 32))
    adam = optax.adam(1e-2)

    @jax.jit
    def step(params, state, memory):
        how = ComputeConfig(dispatcher="dense")  # compiles faster
        loss = functools.partial(loss_fn, cfg=MODEL, objective=CFG.objective, compute=how)
        (value, parts), grads = jax.value_and_grad(loss, has_aux=True)(params, state, batch)
        updates, memory = adam.update(grads, memory)
        stats = {name: a.stats for name, a in parts.aux.items()}
        state = transformer.update_router_state(state, stats, MODEL, CFG.objective)
        return optax.apply_updates(params, updates), state, memory, value, grads

    memory, new, values = adam.init(params), state, []
    for _ in range(60):
        params, new, memory, value, grads = step(params, new, memory)
        values.append(float(value))
    assert values[-1] < 0.5 * values[0]
    np.testing.assert_array_equal(new["moe_blocks"]["table"], state["moe_blocks"]["table"])
    assert (new["moe_blocks"]["expert_bias"] != 0).any(axis=1).all()
    still = {
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(grads)
        if not np.any(g)
    }
    assert still and all("indexer" in path for path in still)


def test_layers_keep_what_their_kind_needs():
    """Bytes of the cache: a window's tokens in every layer, and entries with what the next one needs."""
    from moejax.models.cache import cache_bytes

    short, long = (cache_bytes(MODEL, 1, n) // 4 for n in (64, 128))
    csa = 64 // 2 * (8 + 6)
    assert long - short == 2 * csa + 64 // 4 * 8
    window, recent = 4 * 4 * 8, 2 * 4 * 4 * (8 + 6) + 4 * 2 * 8
    assert short == window + recent + 2 * csa + 64 // 4 * 8

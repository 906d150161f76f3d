"""Generation against the plain forward pass, token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from moejax.evals.generate import generate, sample
from moejax.models import transformer
from moejax.params import init_params

CFG = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    d_ff=32,
    max_seq_len=32,
    init_std=0.3,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    moe=MoEConfig(num_experts=4, experts_per_token=2, d_expert=8),
)


@pytest.fixture(scope="module")
def model():
    params = init_params(transformer.param_specs(CFG), jax.random.key(0))
    return params, transformer.init_router_state(CFG)


def test_greedy_with_cache_equals_forward_without(model):
    """Prompts of different lengths in one batch; every token is the argmax of a full forward pass."""
    prompts = [[3, 7, 1, 30, 2], [5, 9]]
    out = np.stack(list(generate(*model, CFG, prompts, 5)), axis=1)
    forward = jax.jit(
        lambda t: transformer.logits(model[0], transformer.forward(*model, t, CFG).hidden_BSD)
    )
    for prompt, new in zip(prompts, out):
        row = np.zeros((1, 10), np.int32)
        row[0, : len(prompt) + 5] = [*prompt, *new]
        best = np.asarray(forward(row).argmax(axis=-1))[0]
        # The model is causal, so one pass over the finished row gives the choice at every position.
        assert list(best[len(prompt) - 1 : len(prompt) + 4]) == list(new)


def test_same_seed_same_text_and_stop(model):
    draw = lambda seed, **kw: [  # noqa: E731
        int(t[0]) for t in generate(*model, CFG, [[1, 2]], 8, temperature=1.0, seed=seed, **kw)
    ]
    first = draw(1)
    assert first == draw(1)
    assert first != draw(2)
    stopped = draw(1, stop_ids=(first[2],))
    assert stopped == first[: first.index(first[2]) + 1]


def test_top_k_and_top_p_cut_the_tail():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    keys = jax.random.split(jax.random.key(0), 200)
    draws = lambda **kw: set(  # noqa: E731
        np.asarray(jax.vmap(lambda k: sample(logits, k, 1.0, **kw)[0])(keys)).tolist()
    )
    assert draws(top_k=0, top_p=1.0) == {0, 1, 2, 3}
    assert draws(top_k=2, top_p=1.0) == {0, 1}
    # 0.5 + 0.3 reaches 0.7: the third token is outside.
    assert draws(top_k=0, top_p=0.7) == {0, 1}


def test_bad_requests_are_refused(model):
    with pytest.raises(ConfigError, match="max_new may be 30"):
        next(generate(*model, CFG, [[1, 2]], 40))
    with pytest.raises(ConfigError, match="at least one token"):
        next(generate(*model, CFG, [[]], 4))
    moe = MoEConfig(num_experts=4, d_expert=8, router="expert_choice", dispatcher="capacity")
    with pytest.raises(ConfigError, match="not causal"):
        next(generate(*model, ModelConfig(moe=moe), [[1]], 4))

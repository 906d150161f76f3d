"""The decoder: causal, blind across documents, the same with a cache, scanned and rematerialised as asked;
the chunked cross-entropy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import AttentionConfig, ComputeConfig, ModelConfig, MoEConfig, ObjectiveConfig
from moejax.data import synthetic_batch
from moejax.models import transformer
from moejax.models.cache import init_cache, init_layers
from moejax.models.loss import cross_entropy, loss_fn
from moejax.params import init_params

MHA = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8)
GQA = dataclasses.replace(MHA, num_kv_heads=1)
ATTENTION = {
    "mha": MHA,
    "gqa": GQA,
    "windowed": dataclasses.replace(GQA, windows=(3, 0)),
    "hybrid": AttentionConfig(
        kind="hybrid", num_heads=2, num_kv_heads=1, window_kv_heads=2, head_dim=8, v_head_dim=6,
        windows=(3, 0), window_theta=100.0, value_scale=0.7, sinks=True,
    ),
    "mla": AttentionConfig(
        kind="mla", num_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=6,
    ),
}  # fmt: skip
MODEL = ModelConfig(
    vocab_size=32, d_model=16, num_layers=2, d_ff=16, init_std=0.2, attention=MHA,
    moe=MoEConfig(num_experts=4, experts_per_token=2, d_expert=8),
)  # fmt: skip
DENSE = ComputeConfig(dispatcher="dense")  # compiles faster
forward = functools.partial(transformer.forward, compute=DENSE)
TOKENS = jax.random.randint(jax.random.key(2), (2, 8), 0, 32)


def setup(attention):
    cfg = dataclasses.replace(MODEL, attention=attention)
    params = init_params(transformer.param_specs(cfg), jax.random.key(1))
    return cfg, params, transformer.init_router_state(cfg)


@pytest.mark.parametrize("name", sorted(ATTENTION))
def test_cached_equals_full(name):
    cfg, params, state = setup(ATTENTION[name])
    want = jax.jit(lambda t: forward(params, state, t, cfg).hidden_BSD)(TOKENS)
    cache = init_cache(cfg, 2, 10)
    out = forward(params, state, TOKENS[:, :5], cfg, cache=cache, prefill=True)
    got = [out.hidden_BSD]
    decode = jax.jit(lambda t, c, p: forward(params, state, t, cfg, cache=c, positions_BS=p))
    for i in range(5, 8):
        out = decode(TOKENS[:, i : i + 1], out.cache, jnp.full((2, 1), i))
        got.append(out.hidden_BSD)
    # float32, values of order 1; MLA decodes in another order of products.
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=1e-4, atol=1e-4)


@pytest.mark.product
def test_a_cache_in_layers_equals_a_stacked_one():
    """Also with stacked parameters, whose experts are found by their place in the stack."""
    cfg, params, state = setup(MHA)
    cfg = dataclasses.replace(cfg, num_layers=3)
    params = init_params(transformer.param_specs(cfg), jax.random.key(1))
    args = dict(prefill=True)
    want = transformer.forward(params, state, TOKENS, cfg, cache=init_cache(cfg, 2, 8), **args)
    apart = init_layers(cfg, 2, 8)
    with pytest.raises(TypeError, match=r"needs lists of layers \(unstack\) or scan_layers=False"):
        transformer.forward(params, state, TOKENS, cfg, cache=apart, **args)
    unrolled = ComputeConfig(scan_layers=False)
    for form in (params, transformer.unstack(params)):
        got = transformer.forward(form, state, TOKENS, cfg, compute=unrolled, cache=apart, **args)
        # Fused otherwise: a few roundings of float32 at order 1.
        np.testing.assert_allclose(got.hidden_BSD, want.hidden_BSD, atol=1e-5)


def test_causal_and_documents_are_apart():
    cfg, params, state = setup(MHA)
    segments = jnp.tile(jnp.array([1, 1, 1, 1, 2, 2, 2, 2]), (2, 1))
    run = jax.jit(lambda t: forward(params, state, t, cfg, segment_ids_BS=segments).hidden_BSD)
    base = run(TOKENS)
    for position, end in ((1, 4), (5, 8)):  # a change reaches the rest of its document, no more
        moved = jnp.abs(run(TOKENS.at[:, position].add(1) % 32) - base).max(axis=-1)
        assert (moved[:, position:end] > 1e-4).all()
        np.testing.assert_array_equal(moved[:, :position], 0.0)
        np.testing.assert_array_equal(moved[:, end:], 0.0)


def test_padding_in_front_is_refused_or_stated():
    """As attention masks of other libraries may have it; with documents and positions it is none of the tokens'
    business."""
    cfg, params, state = setup(MHA)
    left = jnp.array([[1] * 8, [0] * 3 + [1] * 5])
    with pytest.raises(ValueError, match=r"in front of a token in row 1: pad on the right"):
        forward(params, state, TOKENS, cfg, mask_BS=left)
    with pytest.raises(ValueError, match="row 1"):
        cache = init_cache(cfg, 2, 8)
        forward(
            params, state, TOKENS, cfg, cache=cache, prefill=True, segment_ids_BS=left, mask_BS=left
        )
    with pytest.raises(ValueError, match="row 1"):
        forward(
            params,
            state,
            TOKENS,
            cfg,
            cache=init_cache(cfg, 2, 8),
            prefill=True,
            segment_ids_BS=left,
        )
    at = jnp.maximum(jnp.arange(8)[None] - 3 * (1 - left[:, :1]), 0)
    out = forward(params, state, TOKENS, cfg, positions_BS=at, segment_ids_BS=left)
    want = forward(params, state, TOKENS[1:, 3:], cfg).hidden_BSD[0]
    # float32, values of order 1.
    np.testing.assert_allclose(out.hidden_BSD[1, 3:], want, atol=1e-4)


@pytest.mark.parametrize("chunk", [0, 4])  # 4 tokens over 2 rows: four chunks
def test_chunked_cross_entropy(chunk):
    compute = ComputeConfig(loss_chunk=chunk)
    hidden = jax.random.normal(jax.random.key(3), (2, 8, 16))
    w = jax.random.normal(jax.random.key(4), (16, 32))
    mask = jnp.ones((2, 8)).at[1, 5:].set(0)

    def plain(h, w):
        log_p = jax.nn.log_softmax(h @ w)
        return -(jnp.take_along_axis(log_p, TOKENS[..., None], -1)[..., 0] * mask).sum()

    got = jax.value_and_grad(lambda h, w: cross_entropy(h, w, TOKENS, mask, compute)[0], (0, 1))
    want = jax.value_and_grad(plain, (0, 1))
    # float32 sums of a few hundred terms of order 1.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        got(hidden, w),
        want(hidden, w),
    )


def equations(traced):
    """Every equation of a jaxpr and of the jaxprs inside it."""
    is_jaxpr = lambda a: hasattr(a, "eqns") or hasattr(a, "jaxpr")  # noqa: E731
    for eqn in getattr(traced, "jaxpr", traced).eqns:
        yield eqn
        for inner in filter(is_jaxpr, jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)):
            yield from equations(inner)


def trace(cfg, transform, seq_len, batch_size, **options):
    """The equations of `transform` of the loss with these options; nothing is computed."""
    params = jax.eval_shape(lambda: init_params(transformer.param_specs(cfg), jax.random.key(0)))
    batch = jax.eval_shape(lambda: synthetic_batch(seq_len, batch_size, cfg.vocab_size))
    state = transformer.init_router_state(cfg)
    loss = lambda params, batch: loss_fn(params, state, batch, cfg, **options)[0]  # noqa: E731
    return list(equations(jax.make_jaxpr(transform(loss))(params, batch)))


@pytest.mark.parametrize("chunk", [0, 64])
def test_logits_of_all_tokens_never_exist(chunk):
    """2^25 logits at once, or loss_chunk tokens of them, with MTP too; 1024 tokens have three times 2^25."""
    vocab, tokens = 100_000, 4 * 256
    cfg = dataclasses.replace(MODEL, vocab_size=vocab, mtp_depth=1)
    compute = dataclasses.replace(DENSE, loss_chunk=chunk)
    bound = chunk * vocab if chunk else 2**25
    assert 3 * bound < tokens * vocab
    for transform, objective in (
        (jax.value_and_grad, ObjectiveConfig()),  # training
        (lambda loss: loss, ObjectiveConfig()),
        (lambda loss: loss, None),  # evaluation, which leaves MTP out
    ):
        found = trace(cfg, transform, 256, 4, objective=objective, compute=compute)
        largest = max(v.aval.size for e in found for v in e.outvars)
        # Chunks divide the sequence: of 256 positions 64 where 83 would do.
        assert bound / 2 < largest <= bound


@pytest.mark.parametrize("scan", [True, False])
def test_layers_are_scanned_and_rematerialised_as_asked(scan):
    """Results do not depend on it, time and memory do."""
    cfg = dataclasses.replace(MODEL, num_layers=5, num_dense_layers=2, mtp_depth=2)
    products = {}
    for remat in ("none", "dots", "full"):
        compute = dataclasses.replace(DENSE, scan_layers=scan, remat=remat)
        found = trace(cfg, jax.grad, 8, 2, objective=ObjectiveConfig(), compute=compute)
        names = [e.primitive.name for e in found]
        lengths = [e.params["length"] for e in found if e.primitive.name == "scan"]
        # Two dense layers and three with experts, forward and backward.
        assert sorted(lengths) == ([2, 2, 3, 3] if scan else [])
        again = sum("remat" in n or "checkpoint" in n for n in names)
        # Two depths of MTP, each by itself.
        assert again == (0 if remat == "none" else 2 + 2 if scan else 5 + 2)
        products[remat] = names.count("dot_general")
    # 'dots' computes attention again, whose products are batched, 'full' all of a layer.
    assert products["none"] < products["dots"] < products["full"]

"""Generation against the plain forward pass, token by token."""

import collections
import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from moejax.evals.compile_time import union
from moejax.evals.decode import decode, prefill
from moejax.evals.generate import Stats, generate, prepare, round_up, stream
from moejax.evals.sample import Sampling, row_keys, sample
from moejax.models import transformer
from moejax.models.cache import cache_bytes, init_cache
from moejax.params import init_params
from moejax.routers import router_options

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
PROMPTS = [[3, 7, 1, 30, 2], [5, 9], [11]]


@pytest.fixture(scope="module")
def model():
    params = init_params(transformer.param_specs(CFG), jax.random.key(0))
    return params, transformer.init_router_state(CFG)


@pytest.fixture(scope="module")
def greedy(model):
    return generate(*model, CFG, PROMPTS, 8)


def test_greedy_with_cache_equals_forward_without(model, greedy):
    """Prompts of different lengths in one batch; every token is the argmax of a full forward pass."""
    forward = jax.jit(
        lambda t: transformer.logits(model[0], transformer.forward(*model, t, CFG).hidden_BSD)
    )
    for prompt, new in zip(PROMPTS, greedy):
        row = np.zeros((1, 16), np.int32)
        row[0, : len(prompt) + 8] = [*prompt, *new]
        best = np.asarray(forward(row).argmax(axis=-1))[0]
        # The model is causal, so one pass over the finished row gives the choice at every position.
        assert list(best[len(prompt) - 1 : len(prompt) + 7]) == new


def test_same_seed_same_text_whatever_stands_beside_it(model):
    """Row 1 of three draws the same alone, when it says that it is row 1."""
    how = dict(temperature=1.0, top_p=0.9, top_k=20)
    together = generate(*model, CFG, PROMPTS, 8, seed=1, **how)
    assert together == generate(*model, CFG, PROMPTS, 8, seed=1, **how)
    assert together != generate(*model, CFG, PROMPTS, 8, seed=2, **how)
    assert [together[1]] == generate(*model, CFG, PROMPTS[1:2], 8, seed=1, numbers=[1], **how)
    # Equal prompts in different rows draw differently.
    twins = generate(*model, CFG, [[1, 2]] * 3, 8, seed=1, **how)
    assert twins[0] != twins[1]


def test_stop_ends_a_row_and_not_its_neighbours(model, greedy):
    stopped = generate(*model, CFG, PROMPTS, 8, stop_ids=(greedy[0][2],))
    for whole, row in zip(greedy, stopped):
        end = whole.index(greedy[0][2]) + 1 if greedy[0][2] in whole else 8
        assert row == whole[:end]
    # A rule of the caller, asked between handfuls of tokens.
    ended: list[list[int]] = [[], [], []]
    rule = lambda row: row == 1 and len(ended[1]) >= 3  # noqa: E731
    for new in stream(*model, CFG, PROMPTS, 8, stop=rule):
        ended = [old + tokens for old, tokens in zip(ended, new)]
    assert ended[0] == greedy[0] and ended[2] == greedy[2]
    assert ended[1] == greedy[1][: len(ended[1])] and 3 <= len(ended[1]) < 8


def test_each_row_has_its_own_limit(model, greedy):
    rows = generate(*model, CFG, PROMPTS, [3, 8, 1])
    assert rows == [greedy[0][:3], greedy[1], greedy[2][:1]]
    # 30 tokens fit beside two, and a neighbour of ten leaves it so.
    longest = generate(*model, CFG, [[1, 2], [3] * 10], [30, 2])
    assert len(longest[0]) == 30 and longest[0] == generate(*model, CFG, [[1, 2]], 30)[0]


def test_finished_rows_take_no_part(model, greedy):
    stats = Stats()
    rows = generate(*model, CFG, PROMPTS, 8, stop=lambda row: row != 1, stats=stats)
    assert rows[1] == greedy[1]
    # Rows 0 and 2 stop after their first token: only row 1 takes part in the 7 passes.
    assert "guesses" not in str(stats)
    assert stats.passes == 7 and stats.new_tokens == 8 + 2 and stats.prompt_tokens == 8


def test_compilation_is_told_apart(model):
    first, again = Stats(), Stats()
    for stats in (first, again):
        generate(*model, CFG, [[1] * 21], 3, stats=stats)  # a length that no other test has
    assert first.compile_seconds > 0 and "compiled for" in str(first)
    assert again.compile_seconds == 0 and "compiled" not in str(again)


def test_compilation_is_taken_off_both_times(model, monkeypatch):
    """Each of a prefill and two calls of `decode` is told that it compiled for 1000 s."""
    told = lambda: contextlib.nullcontext(lambda: 1000.0)  # noqa: E731
    monkeypatch.setattr("moejax.evals.generate.compile_seconds", told)
    stats = Stats()
    generate(*model, CFG, [[1] * 21], 4, stats=stats)
    assert stats.compile_seconds == 3000
    assert -1000 < stats.prefill_seconds < -500 and -2000 < stats.decode_seconds < -1500


@pytest.mark.parametrize(
    "spans, length",
    [([], 0), ([(1, 3), (5, 6)], 3), ([(1, 4), (2, 3)], 3), ([(2, 5), (1, 3)], 4)],
)
def test_time_within_time_counts_once(spans, length):
    assert union(spans) == length


def test_prepared_parameters_give_the_same_text(model, greedy):
    assert generate(prepare(model[0]), model[1], CFG, PROMPTS, 8) == greedy
    half = prepare(model[0], "bfloat16")
    assert half["experts"]["w_up"].dtype == jnp.bfloat16
    assert half["moe_blocks"][0]["moe"]["router"]["kernel"].dtype == jnp.float32
    assert half["final_norm"]["scale"].dtype == jnp.float32


def test_cache_holds_kv_lora_and_rope_for_mla():
    """2405.04434 section 2.1.4: the latent and the shared rotary key, whatever the number of heads."""
    mla = AttentionConfig(
        kind="mla", kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
    )
    cfg = dataclasses.replace(CFG, attention=mla)
    cache = init_cache(cfg, 3, 10, dtype=jnp.bfloat16)["all"]
    assert sum(a.size for a in cache.values()) == cfg.num_layers * 3 * 10 * (12 + 4)
    assert sum(a.nbytes for a in cache.values()) == cache_bytes(cfg, 3, 10, "bfloat16")
    assert {a.dtype for a in cache.values()} == {jnp.dtype(jnp.bfloat16)}


def test_few_shapes():
    sizes = {round_up(n) for n in range(1, 4097)}
    assert len(sizes) <= 1 + 4 * 8  # four for each power of two above 16
    assert all(n <= round_up(n) <= max(16, 1.25 * n + 1) for n in range(1, 4097))
    assert round_up(512) == 512 and round_up(576) == 640


@pytest.fixture
def lowered():
    """Name -> how often a jitted function of that name was lowered, that is, compiled for other shapes or
    options."""
    seen = collections.Counter()

    def listen(event, seconds, fun_name="", **_):
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            seen[fun_name] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def test_temperatures_seeds_and_lengths_share_a_program(model, lowered):
    cfg = dataclasses.replace(CFG, norm_eps=2e-6)  # of no other test: nothing is compiled yet
    programs = lambda: [lowered[f"jit({f.__name__})"] for f in (prefill, decode)]  # noqa: E731
    for temperature, top_p, seed in ((0.7, 0.9, 0), (1.2, 1.0, 1), (0, 1, 2), (0.0, 0.5, 3)):
        generate(*model, cfg, PROMPTS, 8, temperature=temperature, top_p=top_p, seed=seed)
    for length in (1, 7, 16):  # and one row more, or one less, within a power of two
        generate(*model, cfg, [[1] * length, *PROMPTS], 8, stop_ids=(length,))
    assert programs() == [1, 1]
    generate(*model, cfg, PROMPTS[:2], 8)
    assert programs() == [2, 2]


def test_top_k_and_top_p_cut_the_tail():
    logits_BV = jnp.tile(jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]])), (200, 1))
    keys_B, position_B = row_keys(0, range(200)), jnp.zeros(200, jnp.int32)
    draws = lambda *how: set(  # noqa: E731
        np.asarray(sample(logits_BV, keys_B, position_B, Sampling(1.0, *how))).tolist()
    )
    assert draws(0, 1.0) == {0, 1, 2, 3}
    assert draws(2, 1.0) == {0, 1}
    # 0.5 + 0.3 reaches 0.7: the third token is outside.
    assert draws(0, 0.7) == {0, 1}


@pytest.mark.parametrize(
    "prompts, max_new, options, message",
    [
        ([[1, 2]], 40, {}, "max_new may be 1 to 30"),
        ([[1, 2]], 0, {}, "max_new may be 1 to 30"),
        ([[]], 4, {}, "at least one token"),
        ([[1], [1, 32]], 4, {}, "prompt 1: it holds a token outside the vocabulary of 32"),
        ([[1]], 4, {"top_p": 0.0}, "top_p=0.0"),
        ([[1]], 4, {"speculative_decoding": True}, "mtp_depth=0"),
    ],
)
def test_bad_requests_are_refused(model, prompts, max_new, options, message):
    with pytest.raises(ConfigError, match=message):
        next(stream(*model, CFG, prompts, max_new, **options))


def test_routers_that_look_ahead_are_refused(model):
    moe = MoEConfig(num_experts=4, d_expert=8, router=router_options("expert_choice"))
    with pytest.raises(ConfigError, match="not causal"):
        generate(*model, ModelConfig(moe=moe), [[1]], 4)

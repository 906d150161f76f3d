"""Generation with a KV cache: prompts of different lengths in one batch, greedy, sampled or speculative.

Prompts are read in one pass (`prefill`); then `decode` runs many tokens in one call on the device and
returns to the host only to hand out tokens. Shapes are rounded up to a few sizes (`round_up`), and seeds,
temperature and top_p are arguments, so repeated calls compile rarely. A row's text does not depend on the rows
beside it: its random numbers depend only on the seed and its row number, finished rows are not routed, and no
route is dropped.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax import axes
from moejax.config import ComputeConfig, ConfigError, ModelConfig
from moejax.evals import speculative
from moejax.evals.compile_time import compile_seconds
from moejax.evals.decode import CHUNKS, NOTHING, State, decode, prefill
from moejax.evals.sample import Sampling, row_keys
from moejax.models import transformer
from moejax.models.cache import cache_bytes
from moejax.params import path_name
from moejax.routers import ROUTERS
from moejax.sharding import Layout
from moejax.weights import as_bits, is_quantized


@dataclasses.dataclass
class Stats:
    """Measurements of a call of `stream`.

    Attributes:
      prompt_tokens, new_tokens: over all rows, padding left out.
      prefill_seconds, decode_seconds: wall time without compilation. A row's first new token belongs to the
        prefill.
      compile_seconds: wall time of tracing and compiling, which only the first call of its shapes needs.
      passes: forward passes after the prefill, summed over rows.
      accepted: how many of those gave a second token.
      speculative: whether second tokens were guessed.
      cache_bytes: of the keys and values of all rows.
    """

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    compile_seconds: float = 0.0
    passes: int = 0
    accepted: int = 0
    speculative: bool = False
    cache_bytes: int = 0

    def __str__(self) -> str:
        text = (
            f"prefill {self.prompt_tokens} tokens, {_rate(self.prompt_tokens, self.prefill_seconds)}; "
            f"decode {self.new_tokens - self.first_tokens} tokens, "
            f"{_rate(self.new_tokens - self.first_tokens, self.decode_seconds)}; "
            f"cache {self.cache_bytes / 2**20:.1f} MiB"
        )
        if self.compile_seconds:
            text += f"; compiled for {self.compile_seconds:.1f} s besides"
        if self.speculative and self.passes:
            text += f"; {self.accepted / self.passes:.0%} of {self.passes} guesses accepted"
        return text


def _rate(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.0f} tokens/s" if seconds else "0 s"


def round_up(n: int, least: int = 16) -> int:
    """Round `n` up to one of four sizes per power of two: few shapes, and at most a quarter is padding."""
    if n <= least:
        return least
    step = max(2 ** (math.ceil(math.log2(n)) - 3), least // 4)
    return math.ceil(n / step) * step


WIDE = ("router", "norm", "sinks", "streams", "w_heads", "position_bias")  # stay float32


def prepare(params: dict, dtype: str = "float32", layout: Layout | None = None) -> dict:
    """Prepare the parameters for decoding. Do it once before several calls of `stream`.

    Casts them to the compute `dtype` if that is narrower; WIDE stay in float32: the router, norms, sinks, what
    mixes streams, the weights of an indexer's heads, position biases. Quantised weights stay as they are. On
    one device it also splits the stack of layers, so that no layer is copied out of it for each token. On CPU
    the experts stay one stack, which is read where it lies, and matrices in bfloat16 (on one device the
    head, too) become their bits (`weights.as_bits`). A head that is the embedding gets a copy of its own there:
    the embedding's rows are its columns.
    """
    on_cpu = jax.default_backend() == "cpu"

    def cast(path, a):
        name = path_name(path)
        if is_quantized(a) or any(word in name for word in WIDE):
            return a
        if a.dtype.itemsize > jnp.dtype(dtype).itemsize:
            a = a.astype(dtype)
        # A head that a mesh splits is multiplied where its parts lie.
        is_matrix = name.rpartition("/")[2].startswith("w_") or (name == "head" and layout is None)
        return as_bits(a) if on_cpu and is_matrix and a.dtype == jnp.bfloat16 else a

    apart = any(isinstance(v, list) for v in params.values())
    params = jax.tree_util.tree_map_with_path(cast, params, is_leaf=is_quantized)
    if apart or layout is not None:
        return params
    if on_cpu and "head" not in params and params["embed"]["tokens"].dtype == jnp.bfloat16:
        params = {**params, "head": as_bits(params["embed"]["tokens"].T)}
    return transformer.unstack(params, but_experts=on_cpu)


def stream(
    params,
    router_state,
    cfg: ModelConfig,
    prompts: list[list[int]],
    max_new: int | Sequence[int],
    *,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008 (frozen)
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    numbers: Sequence[int] | None = None,
    stop_ids: tuple[int, ...] = (),
    stop: Callable[[int], bool] | None = None,
    speculative_decoding: bool = False,
    layout: Layout | None = None,
    stats: Stats | None = None,
) -> Iterator[list[list[int]]]:
    """Continue prompts; yields the new tokens of every row, a few at a time.

    Args:
      params: of the model, as trained or from `prepare`.
      router_state: of the model.
      cfg: the model's config.
      prompts: token ids of each row.
      max_new: tokens per row, at most; one number for all rows, or one for each.
      compute: how the model is computed.
      temperature, top_k, top_p: see `Sampling`; temperature 0 is greedy.
      seed: the same seed gives the same text.
      numbers: of the rows, when the prompts are part of a longer list; None: 0, 1, 2, .. A row's draws
        depend on the seed and its number.
      stop_ids: tokens that end a row; the stop token itself is yielded.
      stop: called with the number of each row (from 0) after its newest tokens were handed out; True ends it.
      speculative_decoding: guess with the MTP head and verify; greedy only.
      layout: the mesh that `params` lie on, None for one device.
      stats: filled in as tokens come.

    Raises:
      ConfigError: an empty prompt, a total longer than model.max_seq_len, a router that is not causal, a
        sampling parameter out of range, speculation without an MTP head or with a temperature.
    """
    how = Sampling(float(temperature), top_k, float(top_p))
    limits = [max_new] * len(prompts) if isinstance(max_new, int) else list(max_new)
    _check(cfg, prompts, limits, how, speculative_decoding)
    stats = stats or Stats()
    params = prepare(params, compute.dtype, layout)
    tokens_BS, lengths_B, max_new_B = _pad(prompts, limits, cfg, layout)
    # Enough for any prompts of this width. A guess is read before its row's end is known: one slot more.
    most = min(tokens_BS.shape[1] + max(limits), cfg.max_seq_len)
    length = round_up(most + int(speculative_decoding))
    numbers = range(len(prompts)) if numbers is None else numbers
    keys_B = row_keys(seed, [*numbers, *[0] * (len(lengths_B) - len(prompts))])
    # Traced, and filled up: other stops compile nothing.
    filling = [NOTHING] * (round_up(len(stop_ids), 8) - len(stop_ids))
    stops = jnp.asarray([*stop_ids, *filling], jnp.int32)
    stats.speculative = speculative_decoding
    stats.prompt_tokens += sum(map(len, prompts))
    stats.cache_bytes = cache_bytes(cfg, len(lengths_B), length, compute.dtype)
    started = time.perf_counter()
    with compile_seconds() as compiling:
        state = prefill(
            params,
            router_state,
            tokens_BS,
            lengths_B,
            max_new_B,
            keys_B,
            stops,
            cfg,
            compute,
            length,
            how,
            speculative_decoding,
            layout,
        )
        rows = [[int(t)] for t in np.asarray(state.token_B)[: len(prompts)]]
    stats.prefill_seconds += time.perf_counter() - started - compiling()
    stats.compile_seconds += compiling()
    stats.first_tokens += len(rows)
    stats.new_tokens += len(rows)
    yield rows
    call = 0
    while True:
        state = _stop_rows(state, stop, len(prompts))
        if not np.asarray(state.left_B).any():
            return
        started = time.perf_counter()
        steps = CHUNKS[min(call, len(CHUNKS) - 1)]
        args = (state, steps, keys_B, stops, cfg, compute, how, layout)
        with compile_seconds() as compiling:
            state, emitted = decode(params, router_state, *args)
            tokens_BC = np.asarray(emitted.tokens_BC)[: len(prompts)]
        rows = [[int(t) for t in row if t != NOTHING] for row in tokens_BC]
        stats.decode_seconds += time.perf_counter() - started - compiling()
        stats.compile_seconds += compiling()
        stats.new_tokens += sum(map(len, rows))
        stats.passes += int(emitted.passes_B.sum())
        stats.accepted += int(emitted.accepted_B.sum())
        yield rows
        call += 1


def _stop_rows(state: State, stop, num_rows: int) -> State:
    if stop is None:
        return state
    left_B = np.array(state.left_B)
    for row in range(num_rows):
        if left_B[row] and stop(row):
            left_B[row] = 0
    return state._replace(left_B=jnp.asarray(left_B))


def generate(
    params,
    router_state,
    cfg: ModelConfig,
    prompts: list[list[int]],
    max_new: int | Sequence[int],
    **options: Any,
) -> list[list[int]]:
    """The new tokens of every row, its stop token included; `options` as for `stream`."""
    rows: list[list[int]] = [[] for _ in prompts]
    for new in stream(params, router_state, cfg, prompts, max_new, **options):
        for row, tokens in zip(rows, new):
            row.extend(tokens)
    return rows


def _pad(prompts, limits: list[int], cfg: ModelConfig, layout: Layout | None):
    """Tokens [B,S], lengths and limits [B]. Idle rows that say nothing fill the batch up to a power of two, and
    on a mesh so that it divides."""
    ways = 1 if layout is None else layout.size(axes.BATCH)
    rows = -(-(2 ** math.ceil(math.log2(len(prompts)))) // ways) * ways
    idle = rows - len(prompts)
    width = min(round_up(max(map(len, prompts))), cfg.max_seq_len)
    tokens_BS = np.zeros((len(prompts) + idle, width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BS[row, : len(prompt)] = prompt
    lengths_B = np.array([len(p) for p in prompts] + [1] * idle, np.int32)
    max_new_B = np.array(limits + [0] * idle, np.int32)
    return tokens_BS, lengths_B, max_new_B


def check_prompt(cfg: ModelConfig, prompt: list[int], max_new: int) -> None:
    """Raises ConfigError if a prompt cannot be continued by `max_new` tokens."""
    if not prompt:
        raise ConfigError("a prompt needs at least one token: start with the bos token")
    if not 0 <= min(prompt) <= max(prompt) < cfg.vocab_size:
        raise ConfigError(
            f"it holds a token outside the vocabulary of {cfg.vocab_size}: it was made with another tokenizer"
        )
    if max_new < 1 or len(prompt) + max_new > cfg.max_seq_len:
        raise ConfigError(
            f"{len(prompt)} prompt tokens and max_new={max_new} must fit model.max_seq_len={cfg.max_seq_len}; "
            f"max_new may be 1 to {max(cfg.max_seq_len - len(prompt), 0)}"
        )


def _check(cfg: ModelConfig, prompts, limits, how: Sampling, speculative_decoding: bool) -> None:
    if cfg.router is not None and not cfg.router.causal:
        causal = ", ".join(repr(n) for n, r in ROUTERS.items() if r.causal)
        raise ConfigError(
            f"model.moe.router.name={cfg.moe.router.name!r} is not causal: a token's route depends on later "
            f"ones, so the model cannot generate; train it with {causal} instead"
        )
    if not prompts:
        raise ConfigError("generate needs a prompt")
    for row, (prompt, max_new) in enumerate(zip(prompts, limits, strict=True)):
        try:
            check_prompt(cfg, prompt, max_new)
        except ConfigError as e:
            raise ConfigError(f"prompt {row}: {e}") from None
    how.check(cfg.vocab_size)
    if speculative_decoding:
        speculative.check(cfg, how.temperature)

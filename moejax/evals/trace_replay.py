"""Replay of a trace file: batches of text that bring along the routes that the file gives their tokens, and one
text that is written again.

Here: N tokens of a trace's row.
"""

import itertools
import pathlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError, ModelConfig
from moejax.data import Tokenizer
from moejax.evals.trace import tokenizer_checksum
from moejax.evals.trace_read import Row, Trace, open_trace, rows
from moejax.models.replay import most_routes, with_routes
from moejax.moe.layer import TOLD


def check_fits(trace: Trace, cfg: ModelConfig, tokenizer: Tokenizer) -> None:
    """ConfigError if the trace's header is that of another kind of model, or of another tokenizer."""
    k = most_routes(cfg)
    ours = {
        "num_experts": cfg.moe.num_experts,
        "layers": list(range(cfg.num_moe_layers)),
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer_checksum(tokenizer),
    }
    for name, value in ours.items():
        given = trace.header.get(
            name, value
        )  # a trace of another engine need not know the tokenizer
        if given != value:
            advice = "; a trace that is replayed needs every layer" if name == "layers" else ""
            raise ConfigError(f"{trace.path} has {name}={given}, this model {value}{advice}")
    if trace.header["experts_per_token"] > k:
        raise ConfigError(
            f"{trace.path} gives a token up to {trace.header['experts_per_token']} experts; a token of this "
            f"model has at most {k}"
        )


def replayed(batches: Iterable[dict], trace: Trace, cfg: ModelConfig) -> Iterator[dict]:
    """The batches with the field `routes`. The trace's rows stand in the order of the text, and may be more.

    Raises ConfigError, naming the row, where its tokens are not those of the trace, or it has no such routes.
    """
    k, number, found = most_routes(cfg), -1, None
    for batch in batches:
        b, s = batch["tokens"].shape
        routes_BSLK = np.full((b, s, cfg.num_moe_layers, k), -1, np.int32)
        found = rows(trace, s) if found is None else found
        for row in range(b):
            number += 1
            real_S = batch["segment_ids"][row] > 0
            if real_S.any():
                given = _same(next(found, None), number, batch["tokens"][row][real_S], trace)
                routes_BSLK[row, real_S, :, : given.shape[2]] = given
        try:
            yield with_routes(batch, routes_BSLK, cfg)
        except ConfigError as e:
            raise ConfigError(f"{trace.path}, rows {number - b + 1} to {number}: {e}") from e


def _same(given: Row | None, number: int, token_n: np.ndarray, trace: Trace) -> np.ndarray:
    """The experts of a row, which must be of these tokens."""
    if given is None:
        raise ConfigError(f"{trace.path} ends before row {number} of the text")
    if given.number != number:
        raise ConfigError(f"{trace.path} has row {given.number} where the text has row {number}")
    if len(given.token_n) != len(token_n):
        raise ConfigError(
            f"{trace.path}: row {number} has {len(given.token_n)} tokens, that of the text {len(token_n)}: "
            "it is of another text, or its rows have another length"
        )
    other = np.flatnonzero(given.token_n != token_n)
    if len(other):
        at = other[0]
        raise ConfigError(
            f"{trace.path}: row {number} is of another text: its token {at} is {given.token_n[at]}, that of "
            f"the text {token_n[at]}"
        )
    return given.experts_nLK


class Told(NamedTuple):
    """The trace of one text, for writing it again.

    Attributes:
      path: the trace.
      token_N: its tokens.
      experts_LNK: the experts of each.
    """

    path: pathlib.Path
    token_N: np.ndarray
    experts_LNK: np.ndarray

    def with_state(self, router_state: dict) -> dict:
        """The router state, with which the token at each position takes its routes."""
        blocks = {**router_state.get("moe_blocks", {}), TOLD: jnp.asarray(self.experts_LNK)}
        return {**router_state, "moe_blocks": blocks}

    def check_prompt(self, prompt: list[int]) -> None:
        """ConfigError if the trace does not begin with these tokens."""
        if len(prompt) > len(self.token_N):
            raise ConfigError(
                f"{self.path} has {len(self.token_N)} tokens, fewer than the {len(prompt)} of the prompt"
            )
        other = np.flatnonzero(self.token_N[: len(prompt)] != prompt)
        if len(other):
            at = other[0]
            raise ConfigError(
                f"{self.path} is of another text: its token {at} is {self.token_N[at]}, that of the prompt "
                f"{prompt[at]}"
            )

    def kept(self, position: int, ids: list[int]) -> list[int]:
        """The new tokens from `position` on, up to the first that is not the trace's: nobody knows what follows
        that one."""
        pairs = itertools.zip_longest(ids, self.token_N[position : position + len(ids)].tolist())
        same = sum(1 for _ in itertools.takewhile(lambda p: p[0] == p[1], pairs))
        return ids[: same + 1]


def told(path: pathlib.Path, cfg: ModelConfig, tokenizer: Tokenizer) -> Told:
    """Opens the trace of one text. ConfigError for one of several, or of another model or tokenizer."""
    trace = open_trace(path)
    check_fits(trace, cfg, tokenizer)
    first, more = itertools.islice(itertools.chain(rows(trace, cfg.max_seq_len), [None, None]), 2)
    if first is None or more is not None:
        raise ConfigError(
            f"{path} is of {'several texts' if more else 'no text'}; generating takes the trace of one: "
            "moejax routes --prompt=TEXT --out=FILE"
        )
    routes_NLK = np.full((len(first.token_n), cfg.num_moe_layers, most_routes(cfg)), -1, np.int32)
    routes_NLK[:, :, : first.experts_nLK.shape[2]] = first.experts_nLK
    try:
        with_routes({"tokens": first.token_n[None]}, routes_NLK[None], cfg)
    except ConfigError as e:
        raise ConfigError(f"{path}: {e}") from e
    return Told(path, first.token_n, routes_NLK.swapaxes(0, 1))

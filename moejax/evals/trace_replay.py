"""Replay of a trace file: batches of text that bring along the routes that the file gives their tokens."""

from collections.abc import Iterable, Iterator

import numpy as np

from moejax.config import ConfigError, ModelConfig
from moejax.data import Tokenizer
from moejax.evals.trace import tokenizer_checksum
from moejax.evals.trace_read import Row, Trace, rows
from moejax.models.replay import most_routes, with_routes


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

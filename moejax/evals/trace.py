"""A trace: which experts each token of a text has in each MoE layer, with what weight, by what margin.

Here: N tokens that are not padding, L the layers that are traced, K the most experts that a token can have.
"""

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ComputeConfig, ConfigError, ExperimentConfig, ModelConfig
from moejax.data import Tokenizer
from moejax.evals.routes import Routes, check_routes, routes_of
from moejax.runs.open import OpenRun
from moejax.sharding import Layout, place_whole

FORMAT, VERSION = "moejax.routes", 1


class Records(NamedTuple):
    """Routes of N tokens, in the order of the text.

    Attributes:
      row_N: number of the row of text, from 0.
      document_N: which document of its row it belongs to, from 1.
      token_N: vocabulary ids.
      experts_NLK: int; -1 is an empty slot, from E on are special experts.
      weights_NLK: float32, 0 in an empty slot; None if nobody knows them.
      margin_NL: float32, see `margins`; NaN where there is none. None for a router without scores.
    """

    row_N: np.ndarray
    document_N: np.ndarray
    token_N: np.ndarray
    experts_NLK: np.ndarray
    weights_NLK: np.ndarray | None
    margin_NL: np.ndarray | None

    def first(self, number: int) -> "Records":
        """The first `number` tokens."""
        fields = self._asdict().items()
        return self._replace(**{name: a[:number] for name, a in fields if a is not None})


def margins(expert_LTK: jax.Array, choice_LTN: jax.Array) -> jax.Array:
    """margin_LT = the lowest value among a token's experts - the highest among the others.

    The values are what the router ranked (`Routes.choice_LTN`): its scores, with any selection bias.
    It is how far they may move until another expert is chosen; a negative one says that something else
    decided: a limit on groups, noise, forced routes. NaN where a token has no expert or all of them.
    """

    def one(of) -> jax.Array:
        expert_TK, choice_TN = of
        tokens, experts = choice_TN.shape
        column_TK = jnp.where((expert_TK < 0) | (expert_TK >= experts), experts, expert_TK)
        has_TN = jnp.zeros((tokens, experts + 1), bool)
        has_TN = has_TN.at[jnp.arange(tokens)[:, None], column_TK].set(True)[:, :-1]
        least_T = jnp.where(has_TN, choice_TN, jnp.inf).min(axis=1)
        best_T = jnp.where(has_TN, -jnp.inf, choice_TN).max(axis=1)
        return jnp.where(jnp.isfinite(least_T - best_T), least_T - best_T, jnp.nan)

    return jax.lax.map(one, (expert_LTK, choice_LTN))  # one layer's table of T by N at a time


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "layers", "layout"))
def trace_batch(
    params: dict,
    router_state: dict,
    batch: dict,
    cfg: ModelConfig,
    compute: ComputeConfig,
    layers: tuple[int, ...],
    layout: Layout | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """(experts, weights, margins) of the `layers` of a batch, [T,L,K], [T,L,K] and [T,L]."""
    routes: Routes = routes_of(params, router_state, batch, cfg, compute, layout=layout)
    at = jnp.array(layers)
    expert_LTK, margin_LT = routes.expert_LTK[at], None
    if routes.choice_LTN is not None:
        margin_LT = margins(expert_LTK, routes.choice_LTN[at])
    turned = [expert_LTK, routes.weights_LTK[at], margin_LT]
    out = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), turned)
    return tuple(
        out if layout is None else jax.lax.with_sharding_constraint(out, layout.replicated)
    )


def trace(
    run: OpenRun,
    batches: Iterable[dict],
    layers: tuple[int, ...],
    *,
    most: int | None = None,
    layout: Layout | None = None,
) -> Iterator[Records]:
    """Records of each batch (fields: DESIGN.md), the first `most` tokens. One batch is held at a time."""
    row, left = 0, most
    for batch in batches:
        if left == 0:
            return
        fields = {name: batch[name] for name in ("tokens", "positions", "segment_ids")}
        out = trace_batch(
            run.params,
            run.router_state,
            place_whole(fields, layout),
            cfg=run.cfg.model,
            compute=run.cfg.compute,
            layers=layers,
            layout=layout,
        )
        experts, weights, margin = jax.device_get(out)
        found = records_of(experts, weights, margin, batch, row)
        row += len(batch["tokens"])
        found = found if left is None else found.first(left)
        left = None if left is None else left - len(found.row_N)
        yield found


def records_of(experts_TLK, weights_TLK, margin_TL, batch: dict, first_row: int) -> Records:
    """What `trace_batch` returned, without padding."""
    real_BS = np.asarray(batch["segment_ids"]) > 0
    real_T = real_BS.reshape(-1)
    return Records(
        first_row + np.nonzero(real_BS)[0],
        np.asarray(batch["segment_ids"])[real_BS],
        np.asarray(batch["tokens"])[real_BS],
        np.asarray(experts_TLK)[real_T],
        np.asarray(weights_TLK, np.float32)[real_T],
        None if margin_TL is None else np.asarray(margin_TL, np.float32)[real_T],
    )


def one_row(ids: list[int], pad_id: int, length: int) -> dict[str, np.ndarray]:
    """A batch of one document in one row of `length`."""
    tokens_S, real_S = np.full(length, pad_id, np.int32), np.arange(length) < len(ids)
    tokens_S[: len(ids)] = ids
    positions_S = np.where(real_S, np.arange(length), 0)
    row = {"tokens": tokens_S, "positions": positions_S, "segment_ids": real_S}
    return {name: a.astype(np.int32)[None] for name, a in row.items()}


def check_layers(cfg: ModelConfig, layers: list[int] | None) -> tuple[int, ...]:
    """The MoE layers to trace, numbered from 0; None: all. ConfigError for one that is not there, or a model
    without routes."""
    check_routes(cfg, "routes")
    every = tuple(range(cfg.num_moe_layers))
    for layer in layers or ():
        if layer not in every:
            raise ConfigError(
                f"--layers: {layer} is not an MoE layer; they are numbered 0 to {every[-1]}"
            )
    return tuple(sorted(set(layers))) if layers else every


# --------------------------------------------------------------------------------------------------
# The header: what a trace belongs to.


def header(
    cfg: ExperimentConfig, tokenizer: Tokenizer, step: int, layers: tuple[int, ...]
) -> dict[str, Any]:
    """What a reader needs to know of a trace; see docs/routes.md."""
    router, sizes = cfg.model.router, cfg.model.router_config()
    assert router is not None
    by_tokens = router.form == "token"
    return {
        "format": FORMAT,
        "version": VERSION,
        "model": cfg.name,
        "step": step,
        "router": cfg.model.moe.router.name,
        "num_experts": cfg.model.moe.num_experts,
        "special_experts": list(router.specials(sizes)),
        "experts_per_token": router.routes_per_token(sizes) if by_tokens else sizes.num_experts,
        "layers": list(layers),
        "num_layers": cfg.model.num_moe_layers,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer_checksum(tokenizer),
    }


def tokenizer_checksum(tokenizer: Tokenizer) -> str:
    """'byte', or the SHA-256 of the run's tokenizer.json."""
    text = getattr(tokenizer, "text", None)
    return "byte" if text is None else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def token_texts(tokenizer: Tokenizer) -> list[str]:
    """A text for every id: its bytes as UTF-8, broken characters as U+FFFD; the name of a special token."""
    texts = [piece.decode("utf-8", "replace") for piece in tokenizer.pieces]
    for name, i in getattr(tokenizer, "special", {}).items():
        texts[i] = name
    for name in ("bos", "eos", "pad"):
        i = getattr(tokenizer, f"{name}_id")
        texts[i] = texts[i] or f"<{name}>"
    return texts

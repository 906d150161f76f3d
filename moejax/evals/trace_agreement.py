"""How many routes differ between two ways of computing the same text: two dtypes, a row at once or token by
token, one device or a mesh. Both ways read the same tokens; nothing is sampled.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ComputeConfig, ConfigError, ExperimentConfig, ModelConfig
from moejax.evals.routes import by_token, routes_of
from moejax.evals.writer import mesh_layout
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.options import choices_of
from moejax.routers import ROUTERS
from moejax.runs.open import OpenRun, load_run
from moejax.sharding import Layout, place_whole
from moejax.text import Table

WAYS = "float32,bfloat16 or prefill,decode or mesh=data=2"


class Agreement(NamedTuple):
    """Counts over tokens that are not padding, and MoE layers.

    Attributes:
      routes_L: routes of both ways.
      routes_differ_L: of these, those to an expert that the token does not have the other way.
      tokens: how many.
      tokens_differ_L: those with at least one such route in that layer.
      tokens_differ: those with at least one in any layer.
    """

    routes_L: np.ndarray
    routes_differ_L: np.ndarray
    tokens: int
    tokens_differ_L: np.ndarray
    tokens_differ: int

    def numbers(self) -> dict[str, Any]:
        """As shares, for JSON."""
        return {
            "tokens": self.tokens,
            "routes_differ": float(self.routes_differ_L.sum() / max(self.routes_L.sum(), 1)),
            "tokens_differ": self.tokens_differ / max(self.tokens, 1),
            "routes_differ_by_layer": (
                self.routes_differ_L / np.maximum(self.routes_L, 1)
            ).tolist(),
            "tokens_differ_by_layer": (self.tokens_differ_L / max(self.tokens, 1)).tolist(),
        }


def compare(one_LTK: np.ndarray, other_LTK: np.ndarray, real_T: np.ndarray) -> Agreement:
    """Counts of one batch; the order of a token's experts does not matter."""
    one_LTK, other_LTK = one_LTK[:, real_T], other_LTK[:, real_T]
    same_LTKK = one_LTK[:, :, :, None] == other_LTK[:, :, None, :]
    alone_LTK = (one_LTK >= 0) & ~same_LTKK.any(axis=3)
    missing_LTK = (other_LTK >= 0) & ~same_LTKK.any(axis=2)
    differ_LT = alone_LTK.any(axis=2) | missing_LTK.any(axis=2)
    count = lambda a_LTK: a_LTK.sum(axis=(1, 2))  # noqa: E731
    return Agreement(
        count(one_LTK >= 0) + count(other_LTK >= 0),
        count(alone_LTK) + count(missing_LTK),
        int(real_T.sum()),
        differ_LT.sum(axis=1),
        int(differ_LT.any(axis=0).sum()),
    )


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "layout"))
def read(params, router_state, batch, *, cfg: ModelConfig, compute: ComputeConfig, layout=None):
    """expert_LTK of a batch, each row read at once."""
    out = routes_of(params, router_state, batch, cfg, compute, layout=layout).expert_LTK
    return out if layout is None else jax.lax.with_sharding_constraint(out, layout.replicated)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def decode(params, router_state, batch, *, cfg: ModelConfig, compute: ComputeConfig):
    """expert_LTK of a batch of one document a row, read token by token with a cache, as generation does."""
    rows, length = batch["tokens"].shape

    def one(cache, at):
        column = lambda name: jax.lax.dynamic_slice_in_dim(batch[name], at, 1, axis=1)  # noqa: E731
        out = transformer.forward(
            params,
            router_state,
            column("tokens"),
            cfg,
            compute=compute,
            positions_BS=column("positions"),
            mask_BS=column("segment_ids") > 0,
            cache=cache,
        )
        expert_LBK, _ = jax.vmap(lambda r: by_token(r, rows))(out.aux["moe_blocks"].routing)
        return out.cache, expert_LBK

    cache = init_cache(cfg, rows, length, dtype=jnp.dtype(compute.dtype))
    _, expert_SLBK = jax.lax.scan(one, cache, jnp.arange(length))
    expert_LBSK = jnp.moveaxis(expert_SLBK, 0, 2)
    return expert_LBSK.reshape(expert_LBSK.shape[0], rows * length, -1)


def as_documents(batch: dict) -> dict:
    """The batch with every row as one document: a cache knows no other."""
    tokens_BS, real_BS = batch["tokens"], np.asarray(batch["segment_ids"]) > 0
    positions_BS = np.where(real_BS, np.arange(tokens_BS.shape[1])[None], 0)
    fields = {"tokens": tokens_BS, "positions": positions_BS, "segment_ids": real_BS}
    return {name: np.asarray(a, np.int32) for name, a in fields.items()}


class Ways(NamedTuple):
    """Two ways of computing: their names, the mesh of the second ('' for none), whether a row is read as one
    document.
    """

    names: tuple[str, str]
    mesh: str = ""
    documents: bool = False


def ways_of(text: str, cfg: ExperimentConfig) -> Ways:
    """What --compare asks for; ConfigError if it is none of WAYS, or the model cannot be decoded."""
    if text.startswith("mesh="):
        mesh = text.removeprefix("mesh=")
        mesh_layout(cfg, mesh)  # refuses what is no mesh, or too large
        return Ways(("one device", mesh), mesh)
    names = tuple(text.split(","))
    dtypes = choices_of(ComputeConfig, "dtype")
    if len(names) != 2 or not (sorted(names) == ["decode", "prefill"] or set(names) <= set(dtypes)):
        raise ConfigError(f"--compare={text}: expected {WAYS}")
    if "decode" not in names:
        return Ways(names)
    router = cfg.model.router
    if router is not None and not router.causal:
        causal = ", ".join(n for n, r in ROUTERS.items() if r.causal)
        raise ConfigError(
            f"--compare={text}: the router {cfg.model.moe.router.name!r} is not causal, so nothing can be "
            f"decoded; a model with one of these would work: {causal}"
        )
    return Ways(names, documents=True)


def agreement(
    ways: Ways,
    run: OpenRun,
    batches: Iterable[dict],
    workdir: pathlib.Path,
    layout: Layout | None = None,
) -> Agreement:
    """Counts over all batches, one at a time. `run` lies on `layout`, that of `ways.mesh`."""
    first, second = (_reader(name, run, layout) for name in ways.names)
    if ways.mesh:
        first = _reader("one device", load_run(workdir, step=run.step), None)
    total: list | None = None
    for batch in batches:
        batch = {name: batch[name] for name in ("tokens", "positions", "segment_ids")}
        batch = as_documents(batch) if ways.documents else batch
        real_T = np.asarray(batch["segment_ids"]).reshape(-1) > 0
        found = compare(np.asarray(first(batch)), np.asarray(second(batch)), real_T)
        total = list(found) if total is None else [a + b for a, b in zip(total, found)]
    assert total is not None, "no batch"
    return Agreement(*total)


def _reader(name: str, run: OpenRun, layout: Layout | None) -> Callable[[dict], jax.Array]:
    compute = run.cfg.compute
    if name in choices_of(ComputeConfig, "dtype"):
        compute = dataclasses.replace(compute, dtype=name)
    static: dict[str, Any] = {"cfg": run.cfg.model, "compute": compute}
    if name == "decode":
        return lambda batch: decode(run.params, run.router_state, batch, **static)
    return lambda batch: read(
        run.params, run.router_state, place_whole(batch, layout), **static, layout=layout
    )


def table(found: Agreement, ways: Ways, title: str) -> Table:
    """The shares, by layer and in all."""
    share = lambda part, whole: f"{part / max(whole, 1):.3%}"  # noqa: E731
    rows = [
        [str(layer), share(differ, routes), share(tokens, found.tokens)]
        for layer, (differ, routes, tokens) in enumerate(
            zip(found.routes_differ_L, found.routes_L, found.tokens_differ_L)
        )
    ]
    all_routes = share(found.routes_differ_L.sum(), found.routes_L.sum())
    rows.append(["any", all_routes, share(found.tokens_differ, found.tokens)])
    header = ["MoE layer", "routes that differ", "tokens with one"]
    note = "Rows are read as one document each." * ways.documents
    return Table(
        f"{title}: {' against '.join(ways.names)}, {found.tokens:,} tokens", header, rows, note
    )

"""What an intervention costs: the loss of the untouched and of the changed model on the same tokens, by domain.

The interval of a difference is a paired bootstrap over pieces of documents (what of a document lies in one
row): both losses are resampled with the same weights. These are Poisson(1) numbers, drawn for each piece, in
place of n pieces drawn with replacement (Chamandy et al., 2012). So sums are all that is kept, however long the
text, and each model reads the text by itself.

Here: R resamples, with the text as it is before them; d domains.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from moejax.config import ComputeConfig, ConfigError, ExperimentConfig, ModelConfig
from moejax.data import Tokenizer, load_tokenizer
from moejax.evals import intervene
from moejax.evals.evaluate import OpenText, open_text
from moejax.evals.intervene import Model
from moejax.evals.intervene_text import Intervention, apply_all, check_all
from moejax.evals.routes import routes_of
from moejax.evals.statistics import CONFIDENCE
from moejax.evals.trace import tokenizer_checksum
from moejax.models.loss import loss_fn
from moejax.models.replay import FIELD, field_of, with_routes
from moejax.runs import folder
from moejax.runs.open import OpenRun, load_run, read_config
from moejax.runs.restore import check_step
from moejax.sharding import Layout, place_whole
from moejax.text import Table

RESAMPLES = 1000


class Sums(NamedTuple):
    """Of one model over the text, float64.

    Attributes:
      nll_Rd, targets_Rd: weighted sums over pieces of documents.
      pieces_d: their number.
      load_LE: routes of each expert.
    """

    nll_Rd: np.ndarray
    targets_Rd: np.ndarray
    pieces_d: np.ndarray
    load_LE: np.ndarray

    @property
    def loss_R(self) -> np.ndarray:
        return _over(self.nll_Rd.sum(axis=1), self.targets_Rd.sum(axis=1))

    @property
    def loss_Rd(self) -> np.ndarray:
        return _over(self.nll_Rd, self.targets_Rd)


def _over(a, b):
    return np.where(b > 0, a / np.maximum(b, 1e-300), np.nan)


_NOTHING = Sums(*[np.zeros(())] * 4)
Routes = Callable[[int, dict], np.ndarray]  # (number of a batch, batch) -> its field `routes`


def measure(model: Model, text: OpenText, routes: Routes | None = None, name: str = "") -> Sums:
    """One pass over the text. Memory does not grow with it.

    Args:
      model: as changed.
      text: batches and domains, and how it is computed.
      routes: what tokens are told; None: routers choose.
      name: for the progress bar.
    """
    step = _compiled(model.cfg, text.run.cfg.compute, text.layout)
    num_domains, sums = len(text.domains), _NOTHING
    progress = tqdm(text.batches, desc=name, unit="batch", total=len(text.batches), leave=False)
    for number, batch in enumerate(progress):
        fields = {k: a for k, a in batch.items() if k != "num_bytes"}
        if routes is not None:
            fields = with_routes(fields, routes(number, fields), model.cfg)
        placed = place_whole(fields, text.layout)
        nll_BS, load_LE = jax.device_get(step(model.params, model.router_state, placed))
        here = _resampled(nll_BS.astype(np.float64), batch, num_domains, number)
        sums = Sums(*map(np.add, sums, (*here, load_LE.astype(np.float64))))
    return sums


@functools.cache  # models that differ only in their arrays share a program
def _compiled(model: ModelConfig, compute: ComputeConfig, layout: Layout | None):
    def step(params, state, batch):
        _, parts = loss_fn(params, state, batch, model, compute=compute, layout=layout)
        load_LN = parts.aux["moe_blocks"].stats["load"]
        return parts.nll_BS, load_LN[:, : model.moe.num_experts]

    return jax.jit(step, out_shardings=None if layout is None else layout.replicated)


def _resampled(nll_BS, batch, num_domains: int, number: int):
    """nll_Rd, targets_Rd and pieces_d of one batch; its weights depend on its number alone."""
    ids_BS = batch["segment_ids"]
    most = int(ids_BS.max()) + 1
    piece_BS = np.arange(len(ids_BS))[:, None] * most + ids_BS
    add = lambda a: np.bincount(piece_BS.ravel(), a.ravel(), len(ids_BS) * most)  # noqa: E731
    nll_P, targets_P = add(nll_BS), add((batch["loss_mask"] > 0).astype(np.float64))
    domain_P = np.zeros(len(nll_P), int)
    domain_P[piece_BS] = batch["domain"]
    kept = targets_P > 0
    hot_Pd = np.eye(num_domains)[domain_P[kept]]
    rng = np.random.default_rng([0, number])
    weights_RP = np.ones((1 + RESAMPLES, kept.sum()))
    weights_RP[1:] = rng.poisson(1.0, (RESAMPLES, kept.sum()))
    of = lambda a_P: weights_RP @ (hot_Pd * a_P[kept][:, None])  # noqa: E731
    return of(nll_P), of(targets_P), hot_Pd.sum(axis=0)


# --------------------------------------------------------------------------------------------------
# Comparisons.


@dataclasses.dataclass(frozen=True)
class Change:
    """Of the loss of one domain, or of all text; nats per token, NaN without text.

    Attributes:
      untouched: the loss of the model as it is.
      changed: of the changed one, the mean over seeds.
      difference: changed - untouched.
      low, high: its 95% interval over the text, NaN for fewer than two pieces.
      seeds: the changed loss with each seed.
      tokens, pieces: how much text that is.
    """

    untouched: float
    changed: float
    difference: float
    low: float
    high: float
    seeds: tuple[float, ...]
    tokens: int
    pieces: int


def compare(untouched: Sums, changed: Sequence[Sums], domains: Sequence[str]) -> dict[str, Change]:
    """'all' -> Change, then each domain that has text."""
    each = {"all": (lambda s: s.loss_R, untouched.targets_Rd.sum(axis=1), untouched.pieces_d.sum())}
    for i, name in enumerate(domains):
        if untouched.targets_Rd[0, i]:
            of = lambda s, i=i: s.loss_Rd[:, i]  # noqa: E731
            each[name] = of, untouched.targets_Rd[:, i], untouched.pieces_d[i]
    out = {}
    for name, (loss, targets_R, pieces) in each.items():
        seeds = [float(loss(s)[0]) for s in changed]
        difference_R = np.mean([loss(s) for s in changed], axis=0) - loss(untouched)
        low, high = math.nan, math.nan
        if pieces > 1:
            tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
            low, high = map(float, np.nanquantile(difference_R[1:], tails))
        before, after = float(loss(untouched)[0]), float(np.mean(seeds))
        out[name] = Change(
            before, after, after - before, low, high, tuple(seeds), int(targets_R[0]), int(pieces)
        )
    return out


def run_interventions(
    interventions: Sequence[Intervention],
    text: OpenText,
    other: Model | None = None,
    untouched: Sums | None = None,
) -> dict[str, Change]:
    """The cost of these interventions together. `check_all` comes before.

    Args:
      interventions: applied in their order, once for each seed.
      text: a run and what it is to read.
      other: the model of `routes_from`.
      untouched: the sums of the model as it is, if they are known.
    """
    model = model_of(text.run)
    if untouched is None:
        untouched = measure(model, text, name="untouched")
    changed = []
    seeds = max(i.seeds for i in interventions)
    for seed in range(seeds):
        here = apply_all(interventions, model, seed, untouched.load_LE)
        routes = routes_for(interventions, text, seed, other)
        name = "changed" if seeds == 1 else f"changed, seed {seed}"
        changed.append(measure(here, text, routes, name))
    return compare(untouched, changed, text.domains)


def routes_for(
    interventions: Sequence[Intervention],
    text: OpenText,
    seed: int,
    other: Model | None,
) -> Routes | None:
    """What tokens are told: nothing, random experts, or the routes of `other`."""
    cfg, layout = text.run.cfg, text.layout
    kinds = [i.kind for i in interventions if i.brings_routes]
    if not kinds:
        return None
    if kinds == ["uniform"]:
        return lambda number, batch: intervene.uniform_routes(
            cfg.model, batch["tokens"].shape, (seed, number)
        )
    assert other is not None
    of = jax.jit(
        lambda params, state, batch: (
            routes_of(params, state, batch, other.cfg, cfg.compute, layout=layout).expert_LTK
        ),
        out_shardings=None if layout is None else layout.replicated,
    )

    def told(number, batch):
        del number
        placed = place_whole({k: a for k, a in batch.items() if k != FIELD}, layout)
        expert_LTK = jax.device_get(of(other.params, other.router_state, placed))
        return np.asarray(field_of(expert_LTK, len(batch["tokens"])))

    return told


def check_alike(cfg: ExperimentConfig, other: ExperimentConfig, name: str) -> None:
    """ConfigError if routes of `other` mean nothing to a model of `cfg`."""
    for key in ("vocab_size", "num_layers", "num_dense_layers", "dense_at"):
        _equal(f"model.{key}", getattr(other.model, key), getattr(cfg.model, key), name)
    for key in ("num_experts", "experts_per_token"):
        _equal(f"model.moe.{key}", getattr(other.model.moe, key), getattr(cfg.model.moe, key), name)
    one, two = (c.model.router for c in (cfg, other))
    assert one is not None and two is not None
    same = one.specials(cfg.model.router_config()) == two.specials(other.model.router_config())
    if not same or two.form != "token":
        raise ConfigError(
            f"{name}: its router {other.model.moe.router.name!r} names other experts than this run's "
            f"{cfg.model.moe.router.name!r}; a checkpoint of the same kind would work"
        )


def _equal(key: str, other, own, name: str) -> None:
    if other != own:
        raise ConfigError(f"{name}: {key} is {other} there and {own} here; it must be the same")


# --------------------------------------------------------------------------------------------------
# As people read it.


def changes_table(changes: dict[str, Change], title: str) -> Table:
    rows = []
    for name, c in changes.items():
        spread = f"{min(c.seeds):.4f} to {max(c.seeds):.4f}" if len(c.seeds) > 1 else ""
        interval = "" if math.isnan(c.low) else f"{c.low:+.4f} to {c.high:+.4f}"
        rows.append(
            [
                name,
                f"{c.untouched:.4f}",
                f"{c.changed:.4f}",
                f"{c.difference:+.4f}",
                interval,
                spread,
            ]
        )
        rows[-1] += [f"{c.tokens:,}", f"{c.pieces:,}"]
    header = [
        "domain", "untouched", "changed", "difference", "95% interval", "seeds", "tokens", "pieces",
    ]  # fmt: skip
    if not any(row[5] for row in rows):
        header, rows = (
            [h for h in header if h != "seeds"],
            [r[:5] + r[6:] for r in rows],
        )
    note = "Nats per token. Intervals: paired bootstrap over pieces of documents."
    return Table(title, header, rows, note)


def as_json(changes: dict[str, Change]) -> dict:
    """NaN is null."""
    clean = lambda v: None if isinstance(v, float) and math.isnan(v) else v  # noqa: E731
    return {
        name: {k: clean(v) for k, v in dataclasses.asdict(c).items()} for name, c in changes.items()
    }


# --------------------------------------------------------------------------------------------------
# A run.


def intervene_run(
    workdir: pathlib.Path,
    interventions: Sequence[Intervention],
    sources: tuple[str, ...] = (),
    **how: Any,
) -> dict[str, Change]:
    """`run_interventions` on a checkpoint; the other arguments are those of `evaluate.open_text`. What
    cannot be is refused before any weights are read."""
    cfg = read_config(workdir)
    check_all(interventions, cfg.model)
    elsewhere = next((i for i in interventions if i.kind == "routes_from"), None)
    if elsewhere is None:
        return run_interventions(interventions, open_text(workdir, sources, **how))
    (other, at), name = elsewhere.value, f"--intervene={elsewhere.text}"
    there = read_config(other)
    check_alike(cfg, there, name)
    check_step(other, at)

    def check(tokenizer: Tokenizer, batches: Any) -> None:
        del batches
        its_own = load_tokenizer(there.data, None, other / folder.TOKENIZER)
        if tokenizer_checksum(its_own) != tokenizer_checksum(tokenizer):
            raise ConfigError(
                f"{name}: its tokenizer is another; a checkpoint with this run's would work"
            )

    text = open_text(workdir, sources, check=check, **how)
    return run_interventions(interventions, text, model_of(load_run(other, text.layout, at)))


def model_of(run: OpenRun) -> Model:
    return Model(run.cfg.model, run.params, run.router_state)

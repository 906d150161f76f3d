"""`--intervene=`: interventions as text, several with commas, applied in their order.

experts=2/7+*/3     without expert 7 of MoE layer 2 and expert 3 of every one; both count from 0
top=4 bottom=4      without the 4 most (least) used experts of each MoE layer, counted on the same text, or
                    :by=FILE#NAME with the largest (smallest) numbers of a JSON file
random=4            without 4 random ones of each layer
best=4              every token without the 4 experts that it scores highest
  :silent           their outputs are zero; else tokens take their next best
  :layers=0+2       in these MoE layers only
  :seeds=3          (random, uniform) that many draws, and their mean
no_shared           without the shared experts; no_shared:one_more with one more routed one instead
k=6                 6 experts for each token
temperature=2       logits of the routers / 2
uniform             random experts for every token, weighed by the router's scores
routes_from=RUN     the experts that another checkpoint chooses, RUN@STEP for an earlier one
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from moejax.config import ConfigError, ModelConfig
from moejax.evals import intervene
from moejax.evals.intervene import Model
from moejax.models.replay import most_routes
from moejax.moe import layer
from moejax.runs.open import OpenRun
from moejax.text import shown

OPTIONS = {
    "experts": ("silent",),
    "top": ("silent", "layers", "by"),
    "bottom": ("silent", "layers", "by"),
    "random": ("silent", "layers", "seeds"),
    "best": ("layers",),
    "no_shared": ("one_more",),
    "k": (),
    "temperature": (),
    "uniform": ("seeds",),
    "routes_from": (),
}
BARE = ("no_shared", "uniform")  # without a value
SWITCHES = ("silent", "one_more")


@dataclasses.dataclass(frozen=True)
class Intervention:
    """One of them, as parsed.

    Attributes:
      text: as it was given.
      kind: a key of OPTIONS.
      value: experts: pairs (layer or None, expert); top, bottom, random, best, k: a number; temperature: a real
        one; routes_from: (folder, step or None); else None.
      silent, one_more, layers, seeds, by: its options.
    """

    text: str
    kind: str
    value: Any = None
    silent: bool = False
    one_more: bool = False
    layers: tuple[int, ...] = ()
    seeds: int = 1
    by: str = ""

    @property
    def needs_load(self) -> bool:
        return self.kind in ("top", "bottom") and not self.by

    @property
    def brings_routes(self) -> bool:
        return self.kind in ("uniform", "routes_from")

    def check(self, cfg: ModelConfig, gone: int = 0) -> tuple[ModelConfig, int]:
        """The config that it leads to, and how many experts of a layer tokens may miss then; `gone`: before it.
        ConfigError for what cannot be with this model. Reads no weights."""
        try:
            self._check(cfg, gone)
        except ConfigError as e:
            raise ConfigError(f"--intervene={self.text}: {e}") from e
        if self.kind == "no_shared":
            return intervene.config_without_shared(cfg, self.one_more), gone
        if self.kind == "k":
            return intervene.config_with_k(cfg, self.value), gone
        return cfg, gone + self._most_out(cfg) * (not self.silent)

    def _check(self, cfg: ModelConfig, gone: int) -> None:
        if self.kind == "no_shared":
            intervene.check_shared(cfg, self.one_more)
        elif self.kind == "k":
            intervene.check_k(cfg, self.value)
        elif self.kind == "temperature":
            intervene.check_temperature(cfg)
        elif self.kind == "uniform":
            intervene.check_uniform(cfg)
        elif self.kind == "routes_from":
            most_routes(cfg)
        else:
            self._check_knockout(cfg, gone)

    def _check_knockout(self, cfg: ModelConfig, gone: int) -> None:
        intervene.check_experts(cfg)
        shape = cfg.num_moe_layers, cfg.moe.num_experts
        for at in [*self.layers, *(at for at, _ in self._places)]:
            if at is not None and not at < shape[0]:
                raise ConfigError(f"there is no MoE layer {at}; there are 0 to {shape[0] - 1}")
        for _, expert in self._places:
            if not expert < shape[1]:
                raise ConfigError(f"there is no expert {expert}; there are 0 to {shape[1] - 1}")
        if self.by:
            read_values(self.by, shape)
        most_out = self._most_out(cfg)
        if most_out > shape[1]:
            raise ConfigError(f"a layer has {shape[1]} experts, not {most_out}")
        if not self.silent:
            name = layer.SKIPPED if self.kind == "best" else layer.BARRED
            intervene.check_rerouting(cfg, name)
            intervene.check_left(cfg, gone + most_out)

    @property
    def _places(self) -> tuple:
        return self.value if self.kind == "experts" else ()

    def _most_out(self, cfg: ModelConfig) -> int:
        if self._places:
            shape = cfg.num_moe_layers, cfg.moe.num_experts
            return int(intervene.given(shape, self._places).sum(axis=1).max())
        return self.value if self.kind in (*_KNOCKOUTS, "best") else 0

    def apply(self, model: Model, seed: int = 0, load_LE: np.ndarray | None = None) -> Model:
        """The changed model. `seed`: of what is random; `load_LE`: the routes of each expert, where
        `needs_load`."""
        cfg = model.cfg
        if self.brings_routes:
            return model
        if self.kind == "no_shared":
            return intervene.drop_shared(model, self.one_more)
        if self.kind == "k":
            return intervene.with_k(model, self.value)
        if self.kind == "temperature":
            return intervene.with_temperature(model, self.value)
        here_L = np.isin(np.arange(cfg.num_moe_layers), self.layers or range(cfg.num_moe_layers))
        if self.kind == "best":
            return intervene.skip_best(model, np.where(here_L, self.value, 0))
        out_LE = self._out(cfg, seed, load_LE) & here_L[:, None]
        return intervene.silence(model, out_LE) if self.silent else intervene.bar(model, out_LE)

    def _out(self, cfg: ModelConfig, seed: int, load_LE) -> np.ndarray:
        shape = cfg.num_moe_layers, cfg.moe.num_experts
        if self.kind == "experts":
            return intervene.given(shape, self.value)
        if self.kind == "random":
            return intervene.drawn(shape, self.value, seed)
        values_LE = read_values(self.by, shape) if self.by else load_LE
        assert values_LE is not None, "the load is counted before"
        return intervene.largest(values_LE if self.kind == "top" else -values_LE, self.value)


def check_all(interventions: Sequence[Intervention], cfg: ModelConfig) -> None:
    """ConfigError for what cannot be, one after the other; reads no weights."""
    gone = 0
    for one in interventions:
        cfg, gone = one.check(cfg, gone)


def apply_all(
    interventions: Sequence[Intervention], model: Model, seed: int = 0, load_LE=None
) -> Model:
    for one in interventions:
        model = one.apply(model, seed, load_LE)
    return model


def changed_run(run: OpenRun, interventions: Sequence[Intervention]) -> OpenRun:
    """The run with a changed model; what it was saved as stays as it is."""
    model = apply_all(interventions, Model(run.cfg.model, run.params, run.router_state))
    cfg = dataclasses.replace(run.cfg, model=model.cfg)
    return run._replace(cfg=cfg, params=model.params, router_state=model.router_state)


def check_alone(interventions: Sequence[Intervention]) -> None:
    """ConfigError for what needs a text to look at, or several draws: where text is written there are none."""
    for one in interventions:
        would = "moejax evaluate takes it"
        if one.needs_load:
            would = f"{one.text}:by=FILE with counts would work"
        elif one.seeds > 1:
            would = "without seeds it would work"
        elif not one.brings_routes:
            continue
        raise ConfigError(f"--intervene={one.text} needs a text with all its tokens; here {would}")


def parse(items: Sequence[str]) -> list[Intervention]:
    """The interventions of all `--intervene=` flags. Raises ConfigError for what is none, and for two that
    contradict each other."""
    texts = [text.strip() for item in items for text in item.split(",")]
    out = [_one(text) for text in texts if text]
    if not out:
        raise ConfigError("--intervene= names nothing; --intervene=top=1 would work")
    for kind in ("k", "temperature", "no_shared"):
        if sum(i.kind == kind for i in out) > 1:
            raise ConfigError(f"--intervene: {kind} is given twice; once would work")
    routes = [i for i in out if i.brings_routes]
    clash = [i for i in out if i.kind in ("k", "best") or (i.kind in _KNOCKOUTS and not i.silent)]
    clash += routes[1:] + [i for i in out if i.one_more]
    if routes and clash:
        raise ConfigError(
            f"--intervene: {routes[0].text} says which experts a token has, and so does {clash[0].text}; one "
            "of them would work"
        )
    if sum(i.seeds > 1 for i in out) > 1:
        raise ConfigError("--intervene: give seeds to one intervention; each seed is a draw of all")
    return out


_KNOCKOUTS = ("experts", "top", "bottom", "random")


def _one(text: str) -> Intervention:
    head, *options = text.split(":")
    kind, equals, value = head.partition("=")
    if kind not in OPTIONS:
        raise ConfigError(
            f"--intervene={text}: there is no {shown(kind)}; there are {', '.join(OPTIONS)}"
        )
    if (kind in BARE) == bool(equals):
        would = kind if kind in BARE else f"{kind}={_EXAMPLES[kind]}"
        raise ConfigError(f"--intervene={text}: {would} would work")
    fields: dict[str, Any] = {}
    for option in options:
        name, equals, given = option.partition("=")
        if name not in OPTIONS[kind] or (name in SWITCHES) == bool(equals):
            have = [o if o in SWITCHES else f"{o}=.." for o in OPTIONS[kind]]
            raise ConfigError(
                f"--intervene={text}: {kind} has no option {shown(option)}; it has {', '.join(have) or 'none'}"
            )
        read = {"layers": lambda t: tuple(_whole(p) for p in t.split("+")), "by": str}
        fields[name] = True if name in SWITCHES else _read(text, read.get(name, _whole), given)
    if fields.get("seeds", 1) < 1:
        raise ConfigError(f"--intervene={text}: seeds must be at least 1")
    how = {"experts": _places, "temperature": _temperature, "routes_from": _run}
    if kind not in BARE:
        fields["value"] = _read(text, how.get(kind, _whole), value)
    if kind == "k" and fields["value"] < 1:
        raise ConfigError(f"--intervene={text}: k must be at least 1")
    return Intervention(text, kind, **fields)


_EXAMPLES = {
    "experts": "0/3", "top": "1", "bottom": "1", "random": "1", "best": "1", "k": "2", "temperature": "2",
    "routes_from": "runs/other",
}  # fmt: skip


def _read(text: str, how, value: str):
    try:
        return how(value)
    except ValueError as e:
        kind = text.partition("=")[0]
        raise ConfigError(
            f"--intervene={text}: cannot read {shown(value)}; {kind}={_EXAMPLES.get(kind, '1')} would work"
        ) from e


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise ValueError(text)
    return int(text)


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _places(text: str) -> tuple[tuple[int | None, int], ...]:
    pairs = [place.split("/") for place in text.split("+")]
    return tuple((None if at == "*" else _whole(at), _whole(expert)) for at, expert in pairs)


def _run(text: str) -> tuple[pathlib.Path, int | None]:
    folder, at, step = text.rpartition("@")
    return (pathlib.Path(folder), _whole(step)) if at else (pathlib.Path(text), None)


def read_values(text: str, shape: tuple[int, int]) -> np.ndarray:
    """The numbers [L, E] of FILE or FILE#NAME, a JSON file; NAME is a path in it, `importance.reap` or its end,
    `reap`. Without a name the file holds one such table. Raises ConfigError for anything else."""
    file, _, name = text.partition("#")
    try:
        values = json.loads(pathlib.Path(file).read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"by={file} cannot be read as JSON: {e}") from e
    tables = {
        at: table for at, table in _tables(values) if f".{at}".endswith(f".{name}" * bool(name))
    }
    if len(tables) != 1:
        named = ", ".join(at for at, _ in _tables(values)) or "none"
        what = f"{len(tables)} tables" + (f" named {name}" if name else "")
        raise ConfigError(f"by={text}: the file holds {what}, one is needed; it has {shown(named)}")
    [table] = tables.values()
    if table.shape != shape or not np.isfinite(table).all():
        raise ConfigError(
            f"by={text}: the table is {list(table.shape)}; it must be finite numbers [MoE layers, experts] = "
            f"{list(shape)}"
        )
    return table


def _tables(value: Any, at: str = "") -> list[tuple[str, np.ndarray]]:
    """(name, table) of every list of equal lists of numbers; a file of JSON is not nested deeply."""
    if isinstance(value, dict):
        return [t for key, v in value.items() for t in _tables(v, f"{at}.{key}".lstrip("."))]
    rows = value if isinstance(value, list) and value else None
    if rows is None or not all(isinstance(r, list) and len(r) == len(rows[0]) for r in rows):
        return []
    if not all(type(a) in (int, float) for r in rows for a in r):
        return []
    try:
        return [(at, np.array(rows, np.float64))]
    except OverflowError:  # a whole number beyond all floats
        return []

"""`moejax models`: published models side by side, computed from their configs beside what was published."""

import dataclasses
import json
import pathlib
import textwrap
from typing import Any

from moejax.config import ConfigError
from moejax.cost import memory
from moejax.cost.architecture import Architecture, counts
from moejax.cost.counted import of_hf
from moejax.cost.flops import flops_per_token
from moejax.cost.hardware import Device, load_device, names
from moejax.cost.published import UNDISCLOSED, facts_of, known_names, published, sizes_text
from moejax.cost.roofline import smallest_devices
from moejax.models import zoo
from moejax.text import UNKNOWN, Number, Table, bytes_text, count_text, flops_text, usd_text


@dataclasses.dataclass(frozen=True)
class Row:
    """One model. A number is None where it is unknown and 'undisclosed' where the publisher keeps
    it.

    Attributes:
      name, kind, weights: what it is; weights are 'open', 'closed' or 'paper only'.
      total, active: parameters with embeddings.
      active_no_lookup: active parameters without the input embedding.
      flops: training FLOPs per token; relative: the same over the baseline's.
      cache: bytes per token of context, at the context compared.
      cache_context: bytes of one sequence at that context.
      size: bytes of the weights in BF16.
      device: smallest single device that holds the weights and one such sequence.
      tokens, gpu_hours, gpu, cost, published, source: as published.
    """

    name: str
    kind: str
    weights: str
    total: Any
    active: Any
    active_no_lookup: Any
    flops: Any
    relative: Any
    cache: Any
    cache_context: Any
    size: Any
    device: str
    tokens: Any
    gpu_hours: Any
    gpu: str
    cost: Any
    published: str
    source: str


def load_architecture(name: str) -> Architecture | None:
    """A model by name or by the path of a config.json (or its directory); None if undisclosed.

    Raises ConfigError for a name that is neither, with the nearest names.
    """
    if name in zoo.PRESETS or name in zoo.COUNTED_PRESETS:
        return of_hf(zoo.load_hf(name), name)
    if name in published():
        return None
    path = pathlib.Path(name)
    if path.exists() or "/" in name or path.suffix == ".json":
        return load_file(path)[0]
    raise ConfigError(zoo.unknown_name(name, known_names()))


def load_file(path: pathlib.Path) -> tuple[Architecture, dict]:
    """A model (named by its directory or file) and its parsed config.json, given as the file or its
    directory; ConfigError names the path."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"{file} does not exist: give a config.json or the directory that holds it"
        )
    try:
        hf = json.loads(file.read_text())
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file} is not readable JSON: {e}") from e
    if not isinstance(hf, dict):
        raise ConfigError(f"{file} must hold an object, not {type(hf).__name__}")
    name = file.absolute().parent.name if file.name == "config.json" else file.stem
    try:
        return of_hf(hf, name), hf
    except ConfigError as e:
        raise ConfigError(f"{file}: {e}") from e


def compare(models: list[str], baseline: str = "", context: int = 4096) -> list[Row]:
    """A row for each model.

    Args:
      models: names, or paths of config.json files.
      baseline: the model FLOPs are relative to; the first if empty.
      context: tokens; a model with a shorter maximum is computed at its maximum.
    """
    if not models:
        raise ConfigError(f"models needs the names of some; known: {', '.join(known_names())}")
    if context < 1:
        raise ConfigError(f"context={context} must be at least 1")
    base = load_architecture(baseline or models[0])
    unit = _training_flops(base, context) if base else None
    devices = [load_device(n) for n in names()]
    return [_row(name, unit, context, devices) for name in models]


def _training_flops(arch: Architecture, context: int) -> float | None:
    return flops_per_token(arch, "train", min(context, arch.max_seq_len)).total


def _row(name: str, unit: float | None, context: int, devices: list[Device]) -> Row:
    arch = load_architecture(name)
    facts = facts_of(name)
    stated = {
        "weights": facts.get("open", UNKNOWN),
        "tokens": facts.get("tokens"),
        "gpu_hours": facts.get("gpu_hours"),
        "gpu": facts.get("gpu", ""),
        "cost": facts.get("cost"),
        "published": sizes_text(facts),
        "source": facts.get("source", ""),
    }
    if arch is None:
        own: dict[str, Any] = {f.name: UNDISCLOSED for f in dataclasses.fields(Row)}
        return Row(**own | stated | {"name": name})
    whole, no_lookup, _ = counts(arch).values()
    length = min(context, arch.max_seq_len)
    flops = _training_flops(arch, context)
    cache_context = memory.cache_bytes(arch, length)
    if cache_context is None and "kv_bytes_per_token" in facts:
        cache_context = facts["kv_bytes_per_token"] * length
    size = memory.weight_bytes(arch)
    device = smallest_devices(size + (cache_context or 0), devices)
    return Row(
        name=name,
        kind="MoE" if arch.experts else "dense",
        total=whole.total + sum(p.total for p in arch.apart),
        active=whole.active,
        active_no_lookup=no_lookup.active,
        flops=flops,
        relative=flops / unit if flops and unit else None,
        cache=None if cache_context is None else cache_context / length,
        cache_context=cache_context,
        size=size,
        device=device.name if device else "none",
        **stated,
    )


# --------------------------------------------------------------------------------------------------
# Tables.


def _show(value: Any, text) -> str:
    return value if isinstance(value, str) else text(value)


def _relative(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3g}"


def _money(row: Row) -> str:
    if row.cost is not None:
        return _show(row.cost, lambda v: usd_text(v))
    if row.gpu_hours is not None:
        return _show(row.gpu_hours, lambda v: f"{count_text(v)} {row.gpu} h")
    return UNKNOWN


def columns(rows: list[Row]) -> dict[str, list[str]]:
    """Column name -> the text of each row."""
    return {
        "model": [r.name for r in rows],
        "kind": [r.kind for r in rows],
        "weights": [r.weights for r in rows],
        "total": [_show(r.total, count_text) for r in rows],
        "active": [_show(r.active, count_text) for r in rows],
        "no lookup": [_show(r.active_no_lookup, count_text) for r in rows],
        "published": [r.published or UNKNOWN for r in rows],
        "FLOPs/token": [_show(r.flops, flops_text) for r in rows],
        "relative": [_show(r.relative, _relative) for r in rows],
        "KV/token": [_show(r.cache, bytes_text) for r in rows],
        "KV cache": [_show(r.cache_context, bytes_text) for r in rows],
        "BF16": [_show(r.size, bytes_text) for r in rows],
        "fits one": [r.device for r in rows],
        "trained on": [_show(r.tokens, count_text) for r in rows],
        "cost": [_money(r) for r in rows],
        "source": [r.source or UNKNOWN for r in rows],
    }


COUNT_NOTE = (
    "Active parameters with embeddings, and without the input embedding, whose lookup costs "
    "nothing: publishers count either way."
)


def need_note(baseline: str, context: int) -> str:
    return (
        f"FLOPs of training (relative: to {baseline}) and KV cache at {context} tokens or the "
        "model's maximum; the cache in BF16, or as published where quantised. BF16: the weights. "
        "Fits one: smallest device that holds weights and one such sequence in 90% of its memory."
    )


def text_tables(rows: list[Row], baseline: str, context: int) -> list[Table]:
    """Three tables narrow enough for a terminal: what models are, what they need, who says so."""
    c = columns(rows)

    def table(names, text=""):
        rows = list(zip(*[c[n] for n in names]))
        return Table("", names, rows, textwrap.fill(text, 98))

    what = ["model", "kind", "weights", "total", "active", "no lookup", "published"]
    need = ["model", "FLOPs/token", "relative", "KV/token", "KV cache", "BF16", "fits one"]
    return [
        table(what, COUNT_NOTE),
        table(need, need_note(baseline, context)),
        table(["model", "trained on", "cost", "source"]),
    ]


def wide_table(rows: list[Row], baseline: str, context: int) -> Table:
    """All columns in one table, for Markdown."""
    c = columns(rows)
    return Table(
        "", list(c), list(zip(*c.values())), f"{COUNT_NOTE} {need_note(baseline, context)}"
    )


def exact_table(rows: list[Row]) -> Table:
    """Every field of the rows (parameters, FLOPs, bytes, USD), for CSV and JSON; unknown is empty."""
    header = [f.name for f in dataclasses.fields(Row)]
    values = [
        [v if isinstance(v, str) else Number("" if v is None else str(v), v) for v in row]
        for row in (dataclasses.astuple(r) for r in rows)
    ]
    return Table("", header, values)

"""A config, its family's name table and a checkpoint's tensors, matched: every tensor accounted for."""

import dataclasses
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moejax.config import ModelConfig
from moejax.interop.files import InteropError
from moejax.interop.safetensors_file import Index
from moejax.models import transformer
from moejax.models.zoo import FAMILIES
from moejax.models.zoo.names import Duplicate, Row, Table, Transform
from moejax.params import ParamSpec, is_spec, path_name

ROUTER_STATE = "router_state"
Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each axis


@dataclasses.dataclass(frozen=True)
class Target:
    """One array of the model and where its values stand in the file.

    Attributes:
      spec: shape (layers and experts first where the row's name has them), axes, and dtype.
      row: the row of the name table.
      layers: numbers in the whole model of the array's layers.
      leading: how many leading axes are separate tensors in the file.
      held: which of `layers` files have a tensor of, see `Table.holds`.
    """

    spec: ParamSpec
    row: Row
    layers: Sequence[int]
    leading: int
    held: tuple[bool, ...]

    @property
    def block(self) -> tuple[int, ...]:
        """The shape that one tensor of the file fills."""
        return self.spec.shape[self.leading :]

    def blocks(self) -> Iterator[tuple[int, ...]]:
        """Every (layer, expert) that files have a tensor of."""
        every = np.ndindex(self.spec.shape[: self.leading])
        return (at for at in every if not at or self.held[at[0]])

    def name(self, at: tuple[int, ...]) -> str:
        """The name in the file of block `at`."""
        layer, expert = (*at, 0, 0)[:2]
        return self.row.hf.format(layer=self.layers[layer], depth=layer, expert=expert)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of each of its tensors in the file."""
        return file_shape(self.block, self.row.transform)

    @property
    def count(self) -> int:
        if not self.leading:
            return 1
        return sum(self.held) * math.prod(self.spec.shape[1 : self.leading])


def file_shape(block: tuple[int, ...], transform: Transform) -> tuple[int, ...]:
    block = (*block[:-1], block[-1] * transform.parts)
    if transform.transpose:
        block = (*block[:-2], block[-1], block[-2])
    return (1,) * transform.lead + block


def file_index(bounds: Bounds, block: tuple[int, ...], transform: Transform) -> Index:
    """Where the part `bounds` of a block stands in its tensor in the file (before any transposition)."""
    *others, (start, stop) = bounds
    part, parts = transform.part, transform.parts
    if transform.interleaved:
        last = slice(start * parts + part, (stop - 1) * parts + part + 1, parts)
    else:
        last = slice(part * block[-1] + start, part * block[-1] + stop)
    index = [*(slice(*b) for b in others), last]
    if transform.transpose:
        index[-2:] = index[-1], index[-2]
    return (*[slice(0, 1)] * transform.lead, *index)


def targets(cfg: ModelConfig, model_type: str, found: Container[str] = ()) -> dict[str, Target]:
    """Every array of the model that files have, by path; InteropError if the family has no name for one.
    `found`: the names in the file, where a family has several for one array."""
    table: Table = FAMILIES[model_type].NAMES
    rows: dict[str, list[Row]] = {}
    for row in table.rows:
        rows.setdefault(row.path, []).append(row)
    layers = transformer.stacks(cfg)
    out = {}
    for path, spec in array_specs(cfg).items():
        group = path.removeprefix(ROUTER_STATE + "/").split("/")[0]
        numbers = layers.get(group, (0,))
        held = tuple(table.holds(cfg, path, layer) for layer in numbers)
        if not any(held):
            continue
        if path not in rows:
            raise InteropError(f"{model_type} checkpoints have no tensor for {path}")
        every = [Target(spec, r, numbers, _leading(r.hf), held) for r in rows[path]]
        first = (held.index(True), 0)
        out[path] = next((t for t in every if t.name(first) in found), every[0])
    return out


def _leading(name: str) -> int:
    return sum(axis in name for axis in ("{layer}", "{depth}", "{expert}"))


def as_saved(cfg: ModelConfig, model_type: str, found: Mapping[str, Any]) -> ModelConfig:
    """The config without multi-token prediction if the files have no tensor of it at all.

    `transformers` leaves those layers out when it saves a DeepSeek-V3, and keeps
    num_nextn_predict_layers in its config.json.
    """
    if not cfg.mtp_depth:
        return cfg
    rows = [row for row in FAMILIES[model_type].NAMES.rows if row.path.startswith("mtp/")]
    names = (row.hf.format(layer=cfg.num_layers, depth=0, expert=0) for row in rows)
    return cfg if any(n in found for n in names) else dataclasses.replace(cfg, mtp_depth=0)


def array_specs(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Specs of parameters and router state by path, the state under 'router_state/'."""
    leaves = jax.tree_util.tree_flatten_with_path(_specs(cfg), is_leaf=is_spec)[0]
    return {path_name(path): spec for path, spec in leaves}


def as_trees(arrays: dict[str, Any], cfg: ModelConfig) -> tuple[dict, dict]:
    """(params, router_state) from arrays by path."""
    tree = jax.tree_util.tree_map_with_path(
        lambda path, _: arrays[path_name(path)], _specs(cfg), is_leaf=is_spec
    )
    return tree, tree.pop(ROUTER_STATE)


def _specs(cfg: ModelConfig) -> dict:
    state = transformer.abstract_router_state(cfg)
    of_state = jax.tree.map(lambda a: ParamSpec(a.shape, (None,) * a.ndim, dtype=a.dtype), state)
    return {**transformer.param_specs(cfg), ROUTER_STATE: of_state}


def duplicates(
    cfg: ModelConfig, table: Table, known: Mapping[str, Any]
) -> Iterator[tuple[str, str, Duplicate]]:
    """(name, name of what it repeats, rule) for this config; `known` are the tensors of the rows."""
    for rule in table.duplicates:
        layers = range(cfg.num_layers, cfg.num_layers + cfg.mtp_depth)
        for layer in layers if "{layer}" in rule.hf else (0,):
            name = rule.hf.format(layer=layer)
            if name not in known:
                yield name, next(n for n in rule.of if n in known), rule


@dataclasses.dataclass(frozen=True)
class Account:
    """What becomes of every tensor of a checkpoint.

    Attributes:
      tensors: name in the table -> tensor, of all that the model is made of.
      repeated: (tensor, the tensor it must equal).
      ignored: names that carry nothing learned.
    """

    tensors: dict[str, Any]
    repeated: list[tuple[Any, Any]]
    ignored: list[str]

    def table(self) -> str:
        """For the end of an import. Unused and missing tensors would have been errors."""
        rows = (
            ("read", len(self.tensors), ""),
            ("repeated", len(self.repeated), "equal to the tensors that they repeat"),
            ("ignored", len(self.ignored), "buffers: " + ", ".join(self.ignored[:3])),
            ("unused", 0, ""),
            ("missing", 0, ""),
        )
        lines = [f"  {name:9} {n:7,}  {text if n else ''}".rstrip() for name, n, text in rows]
        return "tensors\n" + "\n".join(lines)


def account(
    cfg: ModelConfig, table: Table, wanted: dict[str, Target], found: dict[str, Any], where: str
) -> Account:
    """Match the tensors of a checkpoint with the model's; InteropError names what does not fit."""
    expected = sum(t.count for t in wanted.values())
    if expected > 10 * len(found) + 1000:  # before anything of that size is built
        raise InteropError(
            f"{where}: config.json describes a model of {expected:,} tensors, the files hold "
            f"{len(found):,}: they do not belong together"
        )
    names = {_canonical(name, table): name for name in found}
    if len(names) < len(found):
        raise InteropError(f"{where}: tensors with and without the prefix {table.prefix!r}")
    tensors, missing, problems = {}, [], []
    for target in wanted.values():
        shape = target.file_shape
        for at in target.blocks():
            name = target.name(at)
            if name not in names:
                missing.append(name)
                continue
            tensor = tensors[name] = found[names[name]]
            if tensor.shape != shape:
                problems.append(
                    f"{name} has shape {list(tensor.shape)}, config.json asks for {list(shape)}"
                )
            elif not _fits(tensor.dtype, target.spec.dtype):
                ints = np.issubdtype(target.spec.dtype, np.integer)
                work = "I32 or I64" if ints else "BF16, F16 or F32"
                problems.append(f"{name} has dtype {tensor.dtype}; {work} would work")
    repeated = []
    if not missing:
        for name, of, _ in duplicates(cfg, table, tensors):
            if name in names:
                repeated.append((found[names[name]], tensors[of]))
    left = names.keys() - tensors.keys() - {_canonical(t.name, table) for t, _ in repeated}
    ignored = sorted(n for n in left if any(re.fullmatch(p, n) for p in table.ignorable))
    unused = sorted(left - set(ignored))
    problems += _listed("missing", list(dict.fromkeys(missing)))
    problems += _listed("not part of the model that config.json describes", unused)
    if problems:
        shown = problems[:20] + [f"and {len(problems) - 20} more"] * (len(problems) > 20)
        raise InteropError(f"{where}:\n" + "\n".join(f"  - {p}" for p in shown))
    return Account(tensors, repeated, ignored)


def _listed(what: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return [f"{what} ({len(names)}): {', '.join(names[:6])}{more}"]


def _canonical(name: str, table: Table) -> str:
    """The name as the table has it: files may leave out the prefix."""
    known = (rule.hf for rule in table.duplicates)
    return name if name.startswith(table.prefix) or name in known else table.prefix + name


def _fits(dtype: np.dtype, of_array: Any) -> bool:
    """A dtype in which files may have an array of the model."""
    if np.issubdtype(of_array, np.integer):
        return dtype.name in ("int32", "int64")
    return dtype.name in ("bfloat16", "float16", "float32")

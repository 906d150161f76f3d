"""Reads the variants and seeds of an experiment file: `get_sweep()`, which stands beside `get_config()`.

    def get_sweep():
        return {
            "variants": {
                "moe": {},                                    # get_config() as it is
                "dense": {"variant": "dense"},                # get_config("dense")
                "fast": {"optimizer.learning_rate": 4e-3},    # a key of the config, and its value
            },
            "seeds": (0, 1, 2),
            "baseline": "moe",                                # may be left out: the first
        }

A variant becomes the flags of `moejax train`, and nothing else: what is checked here is what runs there.
"""

import dataclasses
import difflib
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from moejax.commands.config_file import get_sweep
from moejax.commands.flags import experiment, overrides_of
from moejax.config import ConfigError, ExperimentConfig
from moejax.text import shown

KEYS = ("variants", "seeds", "baseline")
ARGUMENT = "variant"  # of get_config, among the overrides of a variant
SEEDS = ("train.seed", "data.seed")  # fresh parameters; the order of the training text
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Attributes:
    config: the experiment file.
    variants: of each, the argument of get_config (None: none) and the overrides.
    seeds: of each variant.
    baseline: the variant that the others are compared with.
    common: overrides of the command line, for every variant.
    """

    config: str
    variants: dict[str, tuple[str | None, dict[str, Any]]]
    seeds: tuple[int, ...]
    baseline: str
    common: tuple[str, ...] = ()

    def flags(self, variant: str, seed: int) -> list[str]:
        """The flags of `moejax train` for one run, without its folder."""
        argument, overrides = self.variants[variant]
        return [
            f"--config={self.config}" + ("" if argument is None else f":{argument}"),
            *(f"--config.{key}={_text(value)}" for key, value in overrides.items()),
            *self.common,
            *(f"--config.{key}={seed}" for key in SEEDS),
        ]

    def experiment(self, variant: str, seed: int) -> ExperimentConfig:
        """The config of one run. Raises ConfigError naming every problem."""
        first, *rest = self.flags(variant, seed)
        return experiment(first.removeprefix("--config="), rest)


def read(config: str, argv: list[str]) -> Sweep:
    """The sweep of an experiment file, with the overrides in argv for every variant.

    Raises ConfigError naming every problem of its form; what the variants say is checked by building them.
    """
    path, colon, _ = config.partition(":")
    if colon:
        raise ConfigError(
            f"--config={config}: name the file alone; a variant of get_sweep() names the argument of "
            f"get_config() as {{'{ARGUMENT}': ..}}"
        )
    try:
        values = get_sweep(pathlib.Path(path))
    except ConfigError as e:
        raise ConfigError(f"--config={config}: {e}") from e
    given = {o.key: str(o) for o in overrides_of(argv)}
    problems = _problems(values)
    if not problems:
        clash = [(v, key) for v, changes in values["variants"].items() for key in changes]
        problems = [
            f"{given[k]} is for every variant, but {v} sets {k}" for v, k in clash if k in given
        ]
        problems += [f"{given[k]} is a seed: use --seeds" for k in SEEDS if k in given]
    if problems:
        raise ConfigError(
            f"--config={config}: get_sweep():\n" + "\n".join(f"  - {p}" for p in problems)
        )
    variants = {
        name: (changes.get(ARGUMENT), {k: v for k, v in changes.items() if k != ARGUMENT})
        for name, changes in values["variants"].items()
    }
    baseline = values.get("baseline") or next(iter(variants))
    common = tuple(str(o) for o in overrides_of(argv))
    return Sweep(path, variants, tuple(values["seeds"]), baseline, common)


def chosen(names: list[str], known: Mapping[str, Any]) -> list[str]:
    """`names`, each of which must be a variant; all of them if none is named."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"unknown variant {shown(name)}; {hint}variants: {', '.join(known)}")
    return [n for n in known if n in names or not names]


def seeds_of(values: Any, what: str) -> tuple[int, ...]:
    """Different whole numbers from 0 on, at least one. Raises ConfigError."""
    problem = _seeds_problem(values)
    if problem:
        raise ConfigError(f"{what} {problem}")
    return tuple(values)


def _seeds_problem(values: Any) -> str:
    good = isinstance(values, list | tuple) and values
    if not good or any(type(s) is not int or not 0 <= s < 2**31 for s in values):
        return f"must be whole numbers from 0 on, such as (0, 1, 2), not {shown(values)}"
    return f"names a seed twice: {shown(values)}" if len(set(values)) < len(values) else ""


def _problems(values: Any) -> list[str]:
    """What is wrong with the form of a sweep."""
    if not isinstance(values, Mapping):
        return [f"returned {shown(values)}; it must return a dict with {', '.join(KEYS)}"]
    out = [f"unknown key {shown(k)}; known: {', '.join(KEYS)}" for k in values if k not in KEYS]
    problem = _seeds_problem(values.get("seeds"))
    out += [f"'seeds' {problem}"] if problem else []
    variants = values.get("variants")
    if not isinstance(variants, Mapping) or not variants:
        return [*out, f"'variants' must be a dict, name -> overrides, not {shown(variants)}"]
    small: dict[str, str] = {}
    for name, changes in variants.items():
        out += _variant_problems(name, changes)
        twin = small.setdefault(str(name).lower(), str(name))
        if twin != name:
            out.append(f"variants {twin} and {name} would be one folder where case does not count")
    baseline = values.get("baseline")
    if baseline is not None and baseline not in variants:
        out.append(
            f"'baseline' {shown(baseline)} is none of the variants {', '.join(map(str, variants))}"
        )
    return out


def _variant_problems(name: Any, changes: Any) -> list[str]:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return [
            f"variant {shown(name)}: the name becomes a folder, so use letters, digits and _ . + = -, at most "
            "64, a letter or digit first"
        ]
    if not isinstance(changes, Mapping):
        return [f"variant {name} must be a dict, key of the config -> value, not {shown(changes)}"]
    out = []
    for key, value in changes.items():
        plain = isinstance(value, bool | int | float | str | list | tuple)
        if key == ARGUMENT:
            plain = isinstance(value, str)
        if not isinstance(key, str) or (key != ARGUMENT and "." not in key):
            out.append(
                f"variant {name}: {shown(key)} is no dotted key of the config, such as 'model.d_model', nor "
                f"'{ARGUMENT}', the argument of get_config()"
            )
        elif not plain:
            out.append(
                f"variant {name}: {key} must be a number, text, switch or tuple, not {shown(value)}"
            )
        elif key in SEEDS:
            out.append(f"variant {name}: {key} is moved by 'seeds'")
    return out


def _text(value: Any) -> str:
    """A value as a flag has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(tuple(value)) if isinstance(value, list | tuple) else str(value)

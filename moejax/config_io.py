"""Between ConfigDict, JSON and the dataclasses of `moejax.config`.

`experiments/*.py` hold `get_config() -> ConfigDict` made by `to_config_dict`; flags override single values;
`from_config_dict` turns the ConfigDict into frozen dataclasses once, at the boundary, and reports *every*
problem with the offending keys and what would work. A key that a stored config lacks means its default.
"""

import dataclasses
import difflib
import json
import sys
import typing
from typing import Any

from ml_collections import ConfigDict

from moejax.config import ExperimentConfig, ModelConfig
from moejax.config_checks import experiment_problems, model_problems, problems_text
from moejax.config_old import renewed
from moejax.options import ConfigError, choice_problem
from moejax.routers import DEFAULT, ROUTERS, router_options
from moejax.routers.contract import RouterOptions
from moejax.text import shown


def to_config_dict(cfg: Any) -> ConfigDict:
    """A ConfigDict with the same fields; tuples stay tuples, nesting stays nesting."""

    def plain(c):
        return {
            f.name: plain(v) if dataclasses.is_dataclass(v := getattr(c, f.name)) else v
            for f in dataclasses.fields(c)
        }

    return ConfigDict(plain(cfg)).lock()


def to_json(cfg: Any) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def from_config_dict(values: Any, cls: type = ExperimentConfig, *, check: bool = True) -> Any:
    """Frozen dataclasses from a ConfigDict or dict; raises ConfigError naming every problem at once."""
    problems: list[str] = []
    cfg = _build(cls, values, "", kinds(cls()), problems)
    if not problems and check and cls is ExperimentConfig:
        problems += experiment_problems(cfg)
    if not problems and check and cls is ModelConfig:
        problems += model_problems(cfg, "")
    if problems:
        raise ConfigError(problems_text(problems))
    return cfg


def from_stored(values: dict) -> ExperimentConfig:
    """The experiment of a run's config.json, also of one that an older moejax wrote."""
    return from_config_dict(renewed(values))


def kinds(cfg: Any, prefix: str = "") -> dict[str, type]:
    """The type of every dotted key of a config: of its options, of its groups, and of its router's options."""
    hints, out = typing.get_type_hints(type(cfg)), {}
    for field in dataclasses.fields(cfg):
        value, key = getattr(cfg, field.name), prefix + field.name
        group = dataclasses.is_dataclass(value)
        out |= {key: type(value)} | kinds(value, key + ".") if group else {key: hints[field.name]}
    return out


def every_kind() -> dict[str, type]:
    """`kinds` of an experiment, with the options of every router there is."""
    prefix = "model.moe.router."
    out = kinds(ExperimentConfig())
    for name in ROUTERS:
        out |= kinds(router_options(name), prefix)
    return out


def with_router(cfg: ExperimentConfig, name: str) -> ExperimentConfig:
    """The experiment with another router: options that both routers have by name keep their values, the others
    are the new router's defaults. A router that is another one with options as published has all of those: its
    options are what it is. Raises ConfigError for a router that is not in the table."""
    moe, old = cfg.model.moe, cfg.model.moe.router
    new = router_options(name)
    if name == old.name:
        return cfg
    both = {f.name for f in dataclasses.fields(new)} & {f.name for f in dataclasses.fields(old)}
    if name not in _by_options():
        both = set()
    kept = {key: getattr(old, key) for key in both - {"name"}}
    moe = dataclasses.replace(moe, router=dataclasses.replace(new, **kept))
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, moe=moe))


def with_recipe(cfg: ExperimentConfig, name: str) -> ExperimentConfig:
    """The experiment with a router as its paper has it: its options at their defaults, and its `recipe`.

    Raises ConfigError for a router that is not in the table, or if the rest of the config does not fit it.
    """
    moe = dataclasses.replace(cfg.model.moe, router=router_options(name))
    model = dataclasses.replace(cfg.model, moe=moe)
    values = to_config_dict(dataclasses.replace(cfg, model=model))
    values.update_from_flattened_dict(dict(ROUTERS[name].recipe))
    return from_config_dict(values)


def _by_options() -> list[str]:
    """The routers without those that are another one with options as published."""
    first: dict[type, str] = {}
    for name, router in ROUTERS.items():
        first.setdefault(type(router.options), name)
    return list(first.values())


def unknown_key(key: str, known: dict[str, type]) -> str:
    """What to say of a dotted key that is not among the `kinds` of its config: where it is, or the nearest."""
    group, _, last = key.rpartition(".")
    owners = [n for n in _by_options() if last in kinds(router_options(n))]
    if owners and group.endswith("router"):
        return (
            f"{key} is an option of the router {' and '.join(owners)}: "
            f"choose it by {group}.name={owners[0]}"
        )
    every = [k for k in every_kind() if k != key]
    same = [k for k in every if k.endswith("." + key)]
    same = same or [k for k in every if k.rpartition(".")[2] == last]
    if same:
        return f"unknown key {key}; it is {' or '.join(same)}"
    members = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == group}
    if members:
        near = [members[m] for m in difflib.get_close_matches(last, members, n=1, cutoff=0.5)]
    else:
        near = difflib.get_close_matches(key, known, n=1)
    names = [m for m in members or known if "." not in m]
    hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(names)}"
    return f"unknown key {key}; {hint}"


def _build(cls, values, prefix, known, problems) -> Any:
    base = cls()
    if cls is RouterOptions:
        name = values.get("name", DEFAULT)
        problem = choice_problem(f"{prefix}name", name, ROUTERS)
        if problem:
            problems.append(problem)
            return router_options()
        base = router_options(name)
        known = known | kinds(base, prefix)
    kwargs, own = {}, kinds(base)
    for key, value in values.items():
        kind = own.get(key)
        if "." in str(key):
            problems.append(
                f"unknown key {prefix}{key!r}; a group in a group has braces of its own"
            )
        elif kind is None:
            problems.append(unknown_key(f"{prefix}{key}", known))
        elif not dataclasses.is_dataclass(kind):
            try:
                kwargs[key] = coerce(value, kind)
            except TypeError as e:
                problems.append(must_be(prefix + key, str(e), value))
        elif isinstance(value, dict | ConfigDict):
            kind = RouterOptions if issubclass(kind, RouterOptions) else kind
            kwargs[key] = _build(kind, value, f"{prefix}{key}.", known, problems)
        else:
            names = f" with a name: {', '.join(ROUTERS)}" if issubclass(kind, RouterOptions) else ""
            problems.append(must_be(prefix + key, f"group of options{names}", value))
    return dataclasses.replace(base, **kwargs)


def must_be(key: str, noun: str, value: Any) -> str:
    """The sentence about a value that `coerce` refuses with this noun."""
    return f"{key} must be a{'n' * (noun == 'int')} {noun}, not {shown(value)}"


def coerce(value: Any, want: Any) -> Any:
    """`value` as type `want`: exact types, int for float, list for tuple; never str for a number, and
    no float that is not finite. The TypeError says what is wanted, as a noun."""
    if typing.get_origin(want) is tuple:
        item = typing.get_args(want)[0]
        if not isinstance(value, list | tuple):
            raise TypeError(f"tuple of {item.__name__}s")
        try:
            return tuple(coerce(v, item) for v in value)
        except TypeError as e:
            first, *rest = str(e).split(" of ")
            raise TypeError("tuple of " + " of ".join([f"{first}s", *rest])) from None
    fits = isinstance(value, int | float if want is float else want)
    if not fits or (isinstance(value, bool) and want is not bool):
        raise TypeError(want.__name__)
    if want is float and not abs(value) <= sys.float_info.max:  # false for NaN, too
        raise TypeError("finite float")
    return want(value)

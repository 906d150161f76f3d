"""Reads the flags of a command and the experiment of --config. Anything wrong with them is a ConfigError that
says what would work.
"""

import dataclasses
import difflib
import functools
import pathlib
import re
import typing

from absl import flags
from ml_collections import ConfigDict, config_flags

from moejax.commands.config_file import get_config
from moejax.config import ConfigError, ExperimentConfig
from moejax.config_checks import problems_text
from moejax.config_io import (
    coerce,
    every_kind,
    from_config_dict,
    kinds,
    must_be,
    to_config_dict,
    unknown_key,
    with_router,
)
from moejax.config_old import moved
from moejax.routers import ROUTERS

_OVERRIDE = re.compile(r"--?(no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
_INIT_FROM = "train.init_from"
_ROUTER = "model.moe.router.name"
_HELP = f"""
--config=FILE.py[:ARGUMENT] is a Python file with get_config([ARGUMENT]). --config.KEY=VALUE changes a key of
moejax/config.py; a tuple is written as in Python: --config.data.sources="('a=x.txt', 'b=y.txt')".
--config.{_ROUTER}=NAME chooses another router ({", ".join(ROUTERS)}). Options that
both routers have keep their values, those that only the old one has are gone. A router that is another one
with options as published (mixtral, switch) has all of those. The new router's other options
are at their defaults unless the same command sets them."""


class Override(typing.NamedTuple):
    """`--config.KEY=VALUE`; None: without a value."""

    key: str
    value: str | None

    def __str__(self):
        return f"--config.{self.key}" + ("" if self.value is None else f"={self.value}")


def define_config(fv: flags.FlagValues, text: str) -> None:
    """`--config=FILE.py`; its overrides, `--config.model.moe.num_experts=32`, are for `experiment_of`."""
    flags.DEFINE_string("config", None, text, flag_values=fv)


def define_text(fv: flags.FlagValues) -> None:
    """`--sources`, `--batches`, `--seq_len` and `--batch_size`, for commands that read text by
    `moejax.evals.evaluate.open_text`."""
    whole = functools.partial(flags.DEFINE_integer, default=None, flag_values=fv)
    flags.DEFINE_list("sources", [], "Text: 'domain=FILES', several with commas.", flag_values=fv)
    whole("batches", help="At most this many batches; 0 = all.", lower_bound=0)
    whole("seq_len", help="Tokens per sequence [as in the run].", lower_bound=1)
    whole("batch_size", help="Sequences at once [the run's].", lower_bound=1)


def define_step(fv: flags.FlagValues) -> None:
    """`--step=N`, for commands that read a checkpoint."""
    flags.DEFINE_integer(
        "step", None, "Step of the checkpoint to read [the newest].", flag_values=fv, lower_bound=0
    )


def define_dtype(fv: flags.FlagValues) -> None:
    """`--dtype=`, for commands that compute with a model."""
    flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "Compute in [the run's compute.dtype].",
        flag_values=fv,
    )


def define_intervene(fv: flags.FlagValues) -> None:
    """`--intervene=`, for commands that look at a model; `moejax.evals.intervene_text` reads it."""
    text = "Change the model: top=4, k=6, no_shared, .. (docs/interventions.md); may be repeated."
    flags.DEFINE_multi_string("intervene", [], text, flag_values=fv)


def parse(command: str, usage: str, fv: flags.FlagValues, argv: list[str]) -> list[str] | None:
    """Parse the flags and return the other arguments. Returns None after --help, which prints usage and flags.

    Raises ConfigError, with the usage, for flags that do not exist or have a bad value.
    """
    if any(a in ("--help", "-h", "-help") for a in argv):
        own = [f for fs in fv.flags_by_module_dict().values() for f in fs]
        print(f"{usage}\n\nflags:\n" + "\n".join(_help(f) for f in own) + _HELP * ("config" in fv))
        return None
    try:
        overrides, rest = _split(argv) if "config" in fv else ([], argv)
        rest = fv([command, *rest], known_only=True)[1:]
    except (flags.Error, ValueError) as e:
        raise ConfigError(f"{e}\n{usage}") from e
    end = rest.index("--") if "--" in rest else len(rest)
    unknown = [a for a in rest[:end] if a.startswith("-") and a.strip("-")]
    problems = [_unknown_flag(a, fv) for a in unknown]
    if overrides and not fv.config:
        problems.append(
            f"{overrides[0]} changes an option of an experiment: give --config=FILE.py as well"
        )
    if problems:
        raise ConfigError("\n".join([*problems, usage]))
    return rest[:end] + rest[end + 1 :]


def parse_needed(
    command: str, usage: str, fv: flags.FlagValues, argv: list[str], needed: tuple[str, ...]
) -> bool:
    """`parse` for a command that takes only flags, some of them required. Returns False after --help."""
    rest = parse(command, usage, fv, argv)
    if rest is None:
        return False
    missing = [f"--{name}" for name in needed if not fv[name].value]
    if rest or missing:
        what = f"unexpected {rest}" if rest else f"{command} needs {' and '.join(missing)}"
        raise ConfigError(f"{what}\n{usage}")
    return True


def experiment_of(fv: flags.FlagValues, argv: list[str]) -> ExperimentConfig:
    """The experiment of --config with the overrides in argv. Raises ConfigError naming every problem."""
    workdir = fv.workdir if "workdir" in fv else None
    return experiment(fv.config, argv, pathlib.Path(workdir) if workdir else None)


def experiment(file: str, argv: list[str], workdir: pathlib.Path | None = None) -> ExperimentConfig:
    """The experiment of `FILE.py[:ARGUMENT]` with the overrides in argv; see `experiment_of`. `workdir`: of the
    run, which may be there already."""
    try:
        cfg = from_config_dict(get_config(file), check=False)
    except ConfigError as e:
        raise ConfigError(f"--config={file}: {e}") from e
    given: dict[str, list[Override]] = {}
    for override in overrides_of(argv):
        given.setdefault(override.key, []).append(override)
    problems = []
    for base in given.get(_INIT_FROM, [])[-1:]:
        train = dataclasses.replace(cfg.train, init_from=base.value or "")
        cfg = dataclasses.replace(cfg, train=train)
    if cfg.train.init_from:
        from moejax.train.base import as_base  # with JAX, which --help does without

        cfg = as_base(cfg, workdir)
    for choice in given.pop(_ROUTER, [])[-1:]:
        try:
            cfg = with_router(cfg, choice.value or "")
        except ConfigError as e:
            problems.append(str(e))
            given = {k: v for k, v in given.items() if not k.startswith("model.moe.router.")}
    values, known = to_config_dict(cfg), kinds(cfg)
    for overrides in given.values():
        problem = _apply(overrides, values, known)
        problems += [problem] if problem else []
    if problems:
        raise ConfigError(problems_text(problems))
    return from_config_dict(values)


def overrides_of(argv: list[str]) -> list[Override]:
    """The overrides of an experiment, `--config.KEY=VALUE`, among the arguments of a command."""
    return _split(argv)[0]


def _help(flag: flags.Flag) -> str:
    default = "" if flag.default in (None, False, "", []) else f" [{flag.default}]"
    return f"  --{flag.name:12} {flag.help}{default}"


def _unknown_flag(arg: str, fv: flags.FlagValues) -> str:
    """The error text for an unknown flag: the option of the config with that name, or the nearest flag."""
    name, equals, value = arg.lstrip("-").partition("=")
    options = [k for k, kind in every_kind().items() if not dataclasses.is_dataclass(kind)]
    # '--model.d_model', '--cfg.model.d_model', '--d_model'.
    for end in (name, name.partition(".")[2], name.rpartition(".")[2]) if "config" in fv else ():
        keys = [k for k in options if f".{k}".endswith(f".{end}")]
        if keys:
            would = " or ".join(f"--config.{k}{equals}{value}" for k in keys)
            return f"unknown flag {arg}; {would} would work"
    near = difflib.get_close_matches(name, list(fv), n=1)
    return f"unknown flag {arg}" + (f"; did you mean --{near[0]}?" if near else "")


# --------------------------------------------------------------------------------------------------
# Overrides.


def _split(argv: list[str]) -> tuple[list[Override], list[str]]:
    """Separate the overrides (`--config.KEY=VALUE` or `--config.KEY VALUE`) from the other arguments.

    A switch needs no value; `--noconfig.KEY` turns it off.
    """
    overrides, rest, known = [], [], every_kind()
    args = flags.FlagValues().read_flags_from_files(argv, force_gnu=False)
    while args:
        arg = args.pop(0)
        if arg == "--":
            return overrides, [*rest, arg, *args]
        found = _OVERRIDE.fullmatch(arg)
        if not found or (found[1] and found[3] is not None):
            rest.append(arg)
            continue
        no, key, value = found.groups()
        if no:
            value = "false"
        elif value is None and known.get(key) is bool:
            said = bool(args) and args[0].lower() in ("true", "false")
            value = args.pop(0) if said else "true"
        elif value is None and args and (key in known or not args[0].startswith("-")):
            value = args.pop(0)
        overrides.append(Override(key, value))
    return overrides, rest


def _apply(overrides: list[Override], values: ConfigDict, known: dict[str, type]) -> str | None:
    """Set the value of one key, which is given once, or once for each item of a tuple. Returns an error text or
    None."""
    key, given = overrides[-1]
    want = known.get(key)
    if want is None or dataclasses.is_dataclass(want):
        return _no_option(overrides[-1], known)
    example = f"e.g. --config.{key}={_example(_get(values, key), want)}"
    texts = [o.value for o in overrides if o.value is not None]
    if len(texts) < len(overrides):
        return f"--config.{key} needs a value, {example}"
    fv, argv = flags.FlagValues(), ["", *map(str, overrides)]
    config_flags.DEFINE_config_dict("config", values, flag_values=fv, sys_argv=argv)
    try:
        fv(argv)
        value = _get(values, key)
    except flags.Error:
        value = given  # keep it as text, which fits only a str option
    if isinstance(value, tuple) and any(t in value and _looks_like_several(t) for t in texts):
        value = given
    try:
        coerce(value, want)
    except TypeError as e:
        return f"{must_be(key, str(e), given)}, {example}"
    return None


def _get(values: ConfigDict, key: str) -> typing.Any:
    for part in key.split("."):
        values = values[part]
    return values


def _looks_like_several(text: str) -> bool:
    """Whether a text was meant as a tuple, though it became a single item."""
    return not text or text[0] in "([" or "," in text


def _example(value, want) -> str:
    if typing.get_origin(want) is not tuple:
        return str(value)
    several = {int: (128, 0), float: (0.5, 0.5), str: ("a=b", "c=d")}
    return f'"{several.get(typing.get_args(want)[0], value)}"'


def _no_option(override: Override, known: dict[str, type]) -> str:
    """The error text for a key that does not exist, or that is a group of options."""
    key, value = override
    today = moved(key, value or "")
    if today:
        return f"{override} is now {' '.join(f'--config.{k}={v}' for k, v in today.items())}"
    if key in known:
        members = [k for k in known if k.rpartition(".")[0] == key]
        return f"{override}: {key} is a group of options: {', '.join(members)}"
    return unknown_key(key, known)

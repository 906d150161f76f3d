"""Reading a command's flags: whatever is wrong with them is a ConfigError that says what would work."""

import traceback

from absl import flags
from ml_collections import config_flags

from moejax.config import ConfigError, ExperimentConfig, from_config_dict


def define_config(fv: flags.FlagValues, argv: list[str], text: str) -> None:
    """`--config=FILE.py` and its overrides, `--config.model.moe.num_experts=32`."""
    config_flags.DEFINE_config_file("config", None, text, flag_values=fv, sys_argv=["", *argv])


def parse(command: str, usage: str, fv: flags.FlagValues, argv: list[str]) -> list[str] | None:
    """The arguments that are not flags; None after --help, which prints usage and flags.

    Raises ConfigError, with the usage, for a flag that does not exist or has a bad value.
    """
    if any(a in ("--help", "-h", "-help") for a in argv):
        own = [f for fs in fv.flags_by_module_dict().values() for f in fs]
        print(f"{usage}\n\nflags:\n" + "\n".join(_help(f) for f in own))
        return None
    try:
        rest = fv([command, *argv])[1:]
    except SyntaxError as e:
        raise ConfigError(f"--config: {e.filename} is not Python, line {e.lineno}: {e.msg}") from e
    # ml_collections reports a bad override or file by the last four.
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{_reason(e)}\n{usage}") from e
    except Exception as e:  # whatever the code of a config file raises
        at = traceback.extract_tb(e.__traceback__)[-1]
        raise ConfigError(
            f"--config: {at.filename}, line {at.lineno}: {type(e).__name__}: {e}"
        ) from e
    if "config" in fv and fv["config"].present and fv.config is None:
        raise ConfigError(
            "--config: get_config() of the file returned nothing; it must return a ConfigDict"
        )
    return rest


def parse_needed(
    command: str, usage: str, fv: flags.FlagValues, argv: list[str], needed: tuple[str, ...]
) -> bool:
    """`parse` for a command of flags alone, of which some must be given. False after --help."""
    rest = parse(command, usage, fv, argv)
    if rest is None:
        return False
    missing = [f"--{name}" for name in needed if not fv[name].value]
    if rest or missing:
        what = f"unexpected {rest}" if rest else f"{command} needs {' and '.join(missing)}"
        raise ConfigError(f"{what}\n{usage}")
    return True


def experiment_of(fv: flags.FlagValues) -> ExperimentConfig:
    """The experiment of --config; a file that could not be read is reported when first used."""
    try:
        return from_config_dict(fv.config)
    except OSError as e:
        # ml_collections lists the paths it tried; the last line is the system's error.
        raise ConfigError(f"--config: {str(_chain(e)[-1]).strip().splitlines()[-1].strip()}") from e


def _help(flag: flags.Flag) -> str:
    default = "" if flag.default in (None, False, "") else f" [{flag.default}]"
    return f"  --{flag.name:12} {flag.help}{default}"


def _chain(e: BaseException | None) -> list[BaseException]:
    """An exception and what led to it, the latest first."""
    return [] if e is None else [e, *_chain(e.__cause__ or e.__context__)]


def _reason(e: BaseException) -> str:
    """What the config file itself objected to, or the unknown key, or the flag's own complaint."""
    chain = _chain(e)
    for inner in reversed(chain):
        if isinstance(inner, ConfigError):
            return str(inner)
    for outer in chain:  # later ones add the nearest key
        if isinstance(outer, KeyError) and outer.args:
            return "unknown key " + str(outer.args[0]).replace("\n", ": ")
    if "'get_config'" in str(e):
        return "--config: the file has no get_config()"
    return str(e)

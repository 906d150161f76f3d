"""`moejax compare`: runs side by side (in 0.1.0 the table of published models, now `moejax models`)."""

import shlex

from moejax.config import ConfigError
from moejax.cost.published import known_names


def main(argv: list[str]) -> int:
    """`moejax compare ...`; argv without the command's name. Raises ConfigError for bad input."""
    refuse_models(argv)
    raise ConfigError("there is nothing yet that compares runs")


def refuse_models(argv: list[str]) -> None:
    """ConfigError with the command that does it now, if argv asks for the table of published models."""
    known, flags = set(known_names()), ("--context", "--plot", "--format")
    if any(a in known or a.startswith(flags) for a in argv):
        raise ConfigError(
            "this compares runs; the table of published models is now: "
            f"moejax models {shlex.join(argv)}"
        )

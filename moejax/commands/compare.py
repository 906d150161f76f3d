"""`moejax compare`: runs side by side, with their seeds (the table of published models is `moejax models`)."""

import json
import pathlib
import shlex
import sys

from absl import flags

from moejax.commands.flags import parse
from moejax.config import ConfigError
from moejax.cost.published import known_names

FORMATS = ("table", "markdown", "csv", "json")
USAGE = """\
usage: moejax compare RUN RUN ..               folders of runs; those that differ by their seeds are a group
       moejax compare SWEEP                    a folder of moejax sweep: its variants are the groups
   e.g. moejax compare runs/quickstart-sweep --baseline=dense --page=comparison.html"""


def main(argv: list[str]) -> int:
    """`moejax compare ...`; argv without the command's name. Raises ConfigError for bad input."""
    _refuse_models(argv)
    fv = flags.FlagValues()
    text = flags.DEFINE_string
    text("baseline", "", "The group that the others are compared with [the first].", flag_values=fv)
    text("metric", "loss", "Of held-out text: loss, bits_per_byte, loss/DOMAIN, ..", flag_values=fv)
    flags.DEFINE_integer(
        "step", None, "Compare after this step [the end of finished runs].", flag_values=fv
    )
    flags.DEFINE_enum("format", "table", FORMATS, "table, markdown, csv or json.", flag_values=fv)
    text("page", None, "Also write a page with curves to this .html file.", flag_values=fv)
    text("plot", None, "Also draw the differences into this file (.png, .svg, ..).", flag_values=fv)
    paths = parse("compare", USAGE, fv, argv)
    if paths is None:
        return 0
    if not paths:
        raise ConfigError(f"compare needs folders of runs\n{USAGE}")
    if fv.page and not pathlib.Path(fv.page).absolute().parent.is_dir():
        raise ConfigError(f"--page={fv.page}: there is no such folder")
    if fv.plot:
        from moejax.cost.plot import check_path

        check_path(fv.plot)
    from moejax.evals.comparison import compare
    from moejax.evals.comparison_tables import as_data, run_table, tables
    from moejax.text import render

    found = compare([pathlib.Path(p) for p in paths], fv.metric, fv.baseline, fv.step)
    if fv.format == "json":
        print(json.dumps(as_data(found), indent=1, allow_nan=False))
    else:
        print(
            render([run_table(found)] if fv.format == "csv" else tables(found), fv.format), end=""
        )
    if fv.page:
        from moejax.evals.comparison_page import page

        pathlib.Path(fv.page).write_text(page(found), "utf-8")
        print(f"wrote {fv.page}", file=sys.stderr)
    if fv.plot:
        from moejax.evals.comparison_plot import plot

        plot(found, fv.plot)
        print(f"wrote {fv.plot}", file=sys.stderr)
    return 0


def _refuse_models(argv: list[str]) -> None:
    """ConfigError with the command that does it now, if argv asks for the table of published models."""
    known = {n for n in known_names() if not pathlib.Path(n).exists()}
    if any(a in known or a.startswith("--context") for a in argv):
        raise ConfigError(
            "this compares runs; the table of published models is now: "
            f"moejax models {shlex.join(argv)}"
        )

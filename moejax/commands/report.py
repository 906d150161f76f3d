"""`moejax report`: a page of pictures of a run."""

import pathlib

from absl import flags

from moejax.commands.flags import define_step, parse_needed
from moejax.evals.report import write_report

USAGE = "usage: moejax report --workdir=runs/quickstart [--step=N]"


def main(argv: list[str]) -> int:
    """`moejax report ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder of a trained or analysed run; report.html goes there.",
        flag_values=fv,
    )
    define_step(fv)
    if parse_needed("report", USAGE, fv, argv, ("workdir",)):
        print(f"wrote {write_report(pathlib.Path(fv.workdir), fv.step)[0]}")
    return 0

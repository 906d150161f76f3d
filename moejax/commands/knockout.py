"""`moejax knockout`: the loss of a run against the number of experts taken away."""

import json
import pathlib
import sys

from absl import flags

from moejax.commands.flags import define_step, define_text, parse_needed
from moejax.config import ConfigError
from moejax.runs import folder

USAGE = """\
usage: moejax knockout --workdir=RUN                              each token without its best experts
       moejax knockout --workdir=RUN --orders=best,top,random     ... and layers without their busiest, or any
       moejax knockout --workdir=RUN --experts=0,1,2,4 --silent --orders=top
                                                                  nobody takes the place
   writes knockout.json and knockout.html in the run's folder, or where --json and --html say"""


def main(argv: list[str]) -> int:
    """`moejax knockout ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    text, whole, several = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_list
    text("workdir", None, "Folder of a run, trained or imported.", flag_values=fv)
    several("orders", ["best"], "best, top, bottom, random; with commas.", flag_values=fv)
    several("experts", [], "So many of each layer: 0,1,2,4.", flag_values=fv)
    several("shares", [], "Such shares instead [0,1/16,2/16,3/16,4/16].", flag_values=fv)
    whole("seeds", 3, "Draws of the random order.", flag_values=fv, lower_bound=1)
    flags.DEFINE_boolean("silent", False, "Outputs are zero, no re-routing.", flag_values=fv)
    define_text(fv)
    text("mesh", None, "Devices per axis: data=2,tensor=4 [one device].", flag_values=fv)
    define_step(fv)
    text("json", None, "File of the numbers.", flag_values=fv)
    text("html", None, "File of the page with the curves.", flag_values=fv)
    if not parse_needed("knockout", USAGE, fv, argv, ("workdir",)):
        return 0
    from moejax.evals import knockout
    from moejax.text import render

    orders = list(dict.fromkeys(fv.orders))
    if unknown := [o for o in orders if o not in knockout.ORDERS]:
        raise ConfigError(
            f"--orders: there is no {unknown[0]!r}; {', '.join(knockout.ORDERS)} would work"
        )
    if not orders or (fv.experts and fv.shares):
        raise ConfigError(f"give --orders, and --experts or --shares but not both\n{USAGE}")
    workdir = pathlib.Path(fv.workdir)
    files = [
        pathlib.Path(given) if given else workdir / name
        for given, name in ((fv.json, folder.KNOCKOUT), (fv.html, folder.KNOCKOUT_PAGE))
    ]
    for file in files:
        if workdir.is_dir() and not file.absolute().parent.is_dir():
            raise ConfigError(f"{file}: there is no such folder")
    found = knockout.knockout(
        workdir,
        orders,
        counts=_numbers("experts", fv.experts, int) if fv.experts else None,
        shares=_numbers("shares", fv.shares, _share) if fv.shares else knockout.SHARES,
        seeds=fv.seeds,
        silent=fv.silent,
        sources=tuple(fv.sources),
        num_batches=fv.batches,
        seq_len=fv.seq_len,
        batch_size=fv.batch_size,
        mesh=fv.mesh,
        step=fv.step,
    )
    print(render([knockout.table(found)]))
    files[0].write_text(json.dumps(knockout.as_data(found), indent=1, allow_nan=False) + "\n")
    files[1].write_text(knockout.page(found), "utf-8")
    print(f"wrote {files[0]} and {files[1]}", file=sys.stderr)
    return 0


def _share(text: str) -> float:
    over, _, under = text.partition("/")
    return float(over) / float(under or 1)


def _numbers(name: str, items: list[str], read) -> list:
    try:
        numbers = [read(i) for i in items]
    except (ValueError, ZeroDivisionError) as e:
        raise ConfigError(f"--{name}={','.join(items)} must be numbers with commas") from e
    if any(n < 0 for n in numbers):
        raise ConfigError(f"--{name}={','.join(items)}: none may be negative")
    return numbers

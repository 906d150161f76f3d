"""`moejax analyze`: what the experts of a run do, beside what chance would give."""

import pathlib

from absl import flags

from moejax.commands.flags import define_step, define_text, parse_needed
from moejax.config import ConfigError
from moejax.runs import folder
from moejax.text import render

USAGE = f"""\
usage: moejax analyze --workdir=RUN                                    on its own held-out documents
       moejax analyze --workdir=RUN --steps=all                        every checkpoint: how routes settle
       moejax analyze --workdir=MODEL --sources=code=FILES,wiki=FILES  on other text; an import needs it
       moejax analyze --workdir=RUN --workdir=RUN                      side by side
{folder.ANALYSIS} and {folder.ANALYSIS_TABLE} go into the run's folder; moejax report draws them."""


def main(argv: list[str]) -> int:
    """`moejax analyze ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    flags.DEFINE_multi_string(
        "workdir",
        [],
        "Folder of a run, trained or imported; several times: side by side.",
        flag_values=fv,
    )
    define_step(fv)
    flags.DEFINE_enum("steps", None, ["all"], "all: every checkpoint.", flag_values=fv)
    define_text(fv)
    flags.DEFINE_list(
        "layers", [], "MoE layers, from 0, to keep single experts of [all].", flag_values=fv
    )
    flags.DEFINE_string("out", None, "Another folder to write to; of one run.", flag_values=fv)
    if not parse_needed("analyze", USAGE, fv, argv, ("workdir",)):
        return 0
    if fv.step is not None and fv.steps:
        raise ConfigError("--step and --steps=all: give one of them")
    if not all(i.isascii() and i.isdigit() for i in fv.layers):
        raise ConfigError(f"--layers={','.join(fv.layers)}: numbers with commas would work: 0,3")
    runs = [pathlib.Path(w) for w in fv.workdir]
    if fv.out and len(runs) > 1:
        raise ConfigError("--out takes one --workdir: each run has its own files")
    out = pathlib.Path(fv.out) if fv.out else None
    if out is not None and not out.is_dir():
        raise ConfigError(f"--out={out}: there is no such folder")
    from moejax.evals.analysis.run import analyze_run, write
    from moejax.evals.analysis.text import side_by_side, tables

    each = []
    for workdir in runs:
        found, table = analyze_run(
            workdir,
            tuple(fv.sources),
            step=fv.step,
            all_steps=fv.steps == "all",
            num_batches=fv.batches,
            layers=tuple(map(int, fv.layers)),
            seq_len=fv.seq_len,
            batch_size=fv.batch_size,
        )
        write(found, table, out or workdir)
        each.append((str(workdir), found))
        print(render(tables(found, str(workdir))))
        print(f"wrote {(out or workdir) / folder.ANALYSIS} and {folder.ANALYSIS_TABLE}\n")
    if len(each) > 1:
        print(render([side_by_side(each)]))
    return 0

"""`moejax evaluate`: how well a run predicts held-out text."""

import json
import pathlib

from absl import flags

from moejax.commands.flags import (
    define_dtype,
    define_intervene,
    define_step,
    define_text,
    parse_needed,
)
from moejax.config import ConfigError
from moejax.evals.evaluate import evaluate_run, results_table
from moejax.evals.intervene_run import as_json, changes_table, intervene_run
from moejax.evals.intervene_text import parse
from moejax.text import render

USAGE = """\
usage: moejax evaluate --workdir=RUN                              the text that training validates on
       moejax evaluate --workdir=RUN --batches=0                  all of its held-out documents
       moejax evaluate --workdir=RUN --step=N                     an earlier checkpoint
       moejax evaluate --workdir=RUN --replay=FILE.npz            with the routes of a trace (moejax routes)
       moejax evaluate --workdir=RUN --intervene=top=4,..         against the model without its 4 busiest
                                                                  experts: docs/interventions.md
       moejax evaluate --workdir=RUN --sources=wiki=FILES,..      text, JSON lines or Parquet"""


def main(argv: list[str]) -> int:
    """`moejax evaluate ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    text = flags.DEFINE_string
    text("workdir", None, "Folder of a run, trained or imported.", flag_values=fv)
    define_text(fv)
    text("mesh", None, "Devices per axis: data=2,tensor=4 [one device].", flag_values=fv)
    define_step(fv)
    define_dtype(fv)
    text("replay", None, "A trace of this text, whose routes are taken.", flag_values=fv)
    define_intervene(fv)
    text("json", None, "Also write the results to this file.", flag_values=fv)
    if not parse_needed("evaluate", USAGE, fv, argv, ("workdir",)):
        return 0
    if fv.json and not pathlib.Path(fv.json).absolute().parent.is_dir():
        raise ConfigError(f"--json={fv.json}: there is no such folder")
    how = dict(
        num_batches=fv.batches,
        seq_len=fv.seq_len,
        batch_size=fv.batch_size,
        mesh=fv.mesh,
        step=fv.step,
        dtype=fv.dtype,
    )
    run, sources = pathlib.Path(fv.workdir), tuple(fv.sources)
    at = "" if fv.step is None else f" at step {fv.step}"
    title = f"{fv.workdir}{at} on {', '.join(sources) or 'held-out documents'}"
    if fv.intervene:
        if fv.replay:
            raise ConfigError(
                "--intervene and --replay: one of them would work, or routes_from=RUN"
            )
        interventions = parse(fv.intervene)
        changes = intervene_run(run, interventions, sources, **how)
        table = changes_table(changes, f"{title}: {', '.join(i.text for i in interventions)}")
        results = as_json(changes)
    else:
        replay = pathlib.Path(fv.replay) if fv.replay else None
        results = evaluate_run(run, sources, **how, replay=replay)
        table = results_table(results, title)
    print(render([table]))
    if fv.json:
        pathlib.Path(fv.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0

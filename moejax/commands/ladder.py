"""`moejax ladder`: baseline and variant at several compute-optimal sizes, and what the variant is worth."""

import dataclasses
import json
import pathlib
import statistics

from absl import flags

from moejax.commands import ladder_sizes, sweep_file
from moejax.commands.flags import define_config, parse_needed
from moejax.commands.ladder_sizes import Rung
from moejax.commands.sweep import define_run, read_seeds, run_plan
from moejax.config import ConfigError
from moejax.runs import sweep
from moejax.text import count_text, flops_text, render

USAGE = """\
usage: moejax ladder --config=experiments/quickstart.py --workdir=runs/ladder --variants=dense,moe --heads=2,3,4
       the same command again goes on, and shows what is there
       --variants=BASELINE,VARIANT of get_sweep(); --heads: the sizes; --dry_run: what it would cost
       --config.KEY=VALUE changes a key for both"""


def main(argv: list[str]) -> int:
    """`moejax ladder ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    text, several, real = flags.DEFINE_string, flags.DEFINE_list, flags.DEFINE_float
    define_config(fv, "Experiment: a Python file with get_config() and get_sweep().")
    text("workdir", None, "Folder: WORKDIR/VARIANT-hHEADS/seed_0, ..", flag_values=fv)
    several("variants", [], "Baseline and variant [the file's first two].", flag_values=fv)
    several("heads", [], "Sizes, as numbers of attention heads: 2,3,4.", flag_values=fv)
    real("ratio", 20.0, "Tokens for each parameter.", flag_values=fv, lower_bound=0.01)
    several("seeds", [], "These seeds, with commas [the file's].", flag_values=fv)
    real("floor", None, "Loss that no compute removes [fitted].", flag_values=fv, lower_bound=0.0)
    flags.DEFINE_integer("jobs", 1, "Runs at the same time.", flag_values=fv, lower_bound=1)
    text("element", None, "i/n: every n-th run from the i-th on; i counts from 0.", flag_values=fv)
    define_run(fv)
    text("json", None, "Also write the result to this file.", flag_values=fv)
    text("page", None, "Also draw it on a page, this HTML file.", flag_values=fv)
    if not parse_needed("ladder", USAGE, fv, argv, ("config", "workdir", "heads")):
        return 0
    for name, file in (("json", fv.json), ("page", fv.page)):
        if file and not pathlib.Path(file).absolute().parent.is_dir():
            raise ConfigError(f"--{name}={file}: there is no such folder")
    plan, root = sweep_file.read(fv.config, argv), pathlib.Path(fv.workdir)
    if fv.seeds:
        plan = dataclasses.replace(plan, seeds=read_seeds(fv.seeds))
    sweep_file.chosen(fv.variants, plan.variants)  # they exist
    names = fv.variants or [*plan.variants][:2]
    if len(names) != 2 or names[0] == names[1]:
        raise ConfigError(
            f"--variants={','.join(names)}: name the baseline and one variant of {', '.join(plan.variants)}"
        )
    rungs = ladder_sizes.ladder(plan, names, _heads(fv.heads), fv.ratio)
    whole = ladder_sizes.as_sweep(plan, rungs)
    for rung in rungs:
        if rung.variant == names[0]:
            print(
                f"{rung.heads} heads: {flops_text(rung.compute)}FLOPs, {count_text(rung.tokens)} tokens"
            )
    ended = run_plan(
        whole, [r.name for r in rungs], root, fv.jobs, fv.element, fv.dry_run, fv.force
    )
    if not fv.dry_run:
        _show(fv, (names[0], names[1]), rungs, root, whole.seeds)
    return ended


def _heads(texts: list[str]) -> list[int]:
    if not all(t.isascii() and t.isdigit() and int(t) for t in texts):
        raise ConfigError(f"--heads={','.join(texts)} must be numbers of heads: 2,3,4")
    return sorted({int(t) for t in texts})


def _show(fv, names: tuple[str, str], rungs: list[Rung], root: pathlib.Path, seeds) -> None:
    """Print what the finished runs say, and write what was asked for."""
    from moejax.evals import ladder
    from moejax.evals.charts import Curve, curves
    from moejax.evals.comparison_page import tables_page

    points = {(r.heads, r.variant): _point(r, root, seeds) for r in rungs}
    heads = dict.fromkeys(r.heads for r in rungs)
    both = {h: (points[h, names[0]], points[h, names[1]]) for h in heads}
    if not any(p for pair in both.values() for p in pair):
        print("no rung has a finished run")
        return
    found = ladder.ladder(names, both, fv.floor)
    shown = ladder.tables(found)
    print("\n" + render(shown), end="")
    if fv.json:
        pathlib.Path(fv.json).write_text(json.dumps(ladder.as_data(found), indent=1) + "\n")
    if fv.page:
        lines = [Curve(name, x, y) for name, x, y in ladder.curves_of(found)]
        chart = curves("Held-out loss", "FLOPs of training", "nats per token", lines, flops_text)
        intro = f"{names[1]} against {names[0]}: each size of both trains on the same FLOPs."
        page = tables_page(str(root), "ladder", intro, shown, [chart])
        pathlib.Path(fv.page).write_text(page, "utf-8")


def _point(rung: Rung, root: pathlib.Path, seeds):
    """What the finished runs of a rung say; None if there is none. A run that diverged is none."""
    from moejax.evals.ladder import Point
    from moejax.evals.run_groups import read_run

    losses, speeds = {}, []
    for seed in seeds:
        path = sweep.run_folder(root, rung.name, seed)
        run = read_run(path) if sweep.is_run(path) else None
        if run is not None and "loss" in run.values:
            losses[seed] = run.values["loss"]
            speeds.append(run.values["tokens_per_second"] * run.flops_per_token)
    return Point(rung.compute, losses, statistics.median(speeds)) if losses else None

"""`moejax sweep`: runs the variants and seeds of an experiment file that are missing, and compares them."""

import dataclasses
import pathlib

from absl import flags

from moejax.commands import sweep_file
from moejax.commands.flags import define_config, parse_needed
from moejax.commands.sweep_file import Sweep
from moejax.commands.sweep_jobs import Job, run_jobs
from moejax.config import ConfigError, ExperimentConfig
from moejax.data.vocabulary import with_vocabulary
from moejax.runs import folder, sweep
from moejax.runs.open import read_config
from moejax.runs.progress import DIVERGED, FINISHED, progress
from moejax.text import Table, render, seconds_text

USAGE = """\
usage: moejax sweep --config=experiments/quickstart.py --workdir=runs/quickstart-sweep
       the same command again goes on: what is finished is skipped, what was stopped is resumed
       --config.KEY=VALUE changes a key for every variant
   e.g. moejax sweep --config=.. --workdir=.. --only=moe,dense --seeds=0,1,2 --jobs=2
        moejax sweep --config=.. --workdir=SHARED --element=$SLURM_ARRAY_TASK_ID/8"""


def main(argv: list[str]) -> int:
    """`moejax sweep ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    text = flags.DEFINE_string
    define_config(fv, "Experiment: a Python file with get_config() and get_sweep().")
    text("workdir", None, "Folder of the sweep: WORKDIR/VARIANT/seed_0, ..", flag_values=fv)
    flags.DEFINE_list("only", [], "These variants, with commas [all].", flag_values=fv)
    flags.DEFINE_list("seeds", [], "These seeds, with commas [the file's].", flag_values=fv)
    flags.DEFINE_integer(
        "jobs", 1, "Runs at the same time; they share the cores.", flag_values=fv, lower_bound=1
    )
    text("element", None, "i/n: every n-th run from the i-th on; i counts from 0.", flag_values=fv)
    define_run(fv)
    if not parse_needed("sweep", USAGE, fv, argv, ("config", "workdir")):
        return 0
    root = pathlib.Path(fv.workdir)
    plan = sweep_file.read(fv.config, argv)
    if fv.seeds:
        plan = dataclasses.replace(plan, seeds=read_seeds(fv.seeds))
    variants = sweep_file.chosen(fv.only, plan.variants)
    ended = run_plan(plan, variants, root, fv.jobs, fv.element, fv.dry_run, fv.force)
    if not fv.dry_run:
        _compare(root)
    return ended


def define_run(fv: flags.FlagValues) -> None:
    """What every command that runs a plan takes."""
    switch = flags.DEFINE_boolean
    switch("dry_run", False, "Check and list the runs; start none.", flag_values=fv)
    switch("force", False, "Run although a plan needs more memory than is free.", flag_values=fv)


def run_plan(
    plan: Sweep,
    variants: list[str],
    root: pathlib.Path,
    at_once: int,
    element: str | None,
    dry: bool,
    force: bool = False,
) -> int:
    """Check the runs, list them, and (unless `dry`) run what is missing. Returns the exit status.

    Raises ConfigError, before anything is started, for runs that are wrong or (unless `force`) do not fit.
    """
    configs = _configs(plan, variants, root)
    jobs = _element(
        element, [_job(plan, root, v, s, configs[v], force) for s in plan.seeds for v in variants]
    )
    from moejax.train.fits import find

    found = dict(zip(variants, find([configs[v] for v in variants], at_once)))
    # Without a plan it is no memory that is missing: the devices do not match.
    _refuse({v: f.problem for v, f in found.items() if f.problem and not (force and f.plan)})
    print(render([_plan_table(jobs, found, at_once)]))
    if dry:
        return 0
    sweep.write(root, _record(plan, root))
    return run_jobs(jobs, at_once)


def read_seeds(texts: list[str]) -> tuple[int, ...]:
    numbers = [int(t) if t.isascii() and t.isdigit() else t for t in texts]
    return sweep_file.seeds_of(numbers, "--seeds")


def _configs(plan: Sweep, variants: list[str], root: pathlib.Path) -> dict[str, ExperimentConfig]:
    """The config of each variant with its first seed. ConfigError naming what is wrong with any of them, also
    with the runs that are there already."""
    configs: dict[str, ExperimentConfig] = {}
    problems: dict[str, str] = {}
    for variant in variants:
        try:
            configs[variant] = plan.experiment(variant, plan.seeds[0])
            for seed in plan.seeds:
                workdir = sweep.run_folder(root, variant, seed)
                _check_run(workdir, plan.experiment(variant, seed))
        except ConfigError as e:
            problems[variant] = str(e)
    _refuse(problems)
    return configs


def _check_run(workdir: pathlib.Path, cfg: ExperimentConfig) -> None:
    """ConfigError if the run in this folder has another config, or was trained for longer."""
    folder.check_path(workdir)
    if not sweep.is_run(workdir):
        return
    there = read_config(workdir)
    folder.check_workdir(workdir, with_vocabulary(cfg, there.model.vocab_size))
    step = progress(workdir, cfg.train.steps).step
    if step > cfg.train.steps:
        raise ConfigError(
            f"{workdir} was trained for {step} steps, more than the {cfg.train.steps} wanted; use another "
            "--workdir"
        )


def _refuse(problems: dict[str, str]) -> None:
    if problems:
        same: dict[str, list[str]] = {}
        for variant, text in problems.items():
            same.setdefault(text.replace("\n", "\n    "), []).append(variant)
        lines = [f"variant{'s' * (len(v) > 1)} {', '.join(v)}: {text}" for text, v in same.items()]
        raise ConfigError("nothing was started:\n" + "\n".join(lines))


def _element(element: str | None, jobs: list[Job]) -> list[Job]:
    """Every n-th job from the i-th on, of 'i/n'."""
    if element is None:
        return jobs
    i, slash, n = element.partition("/")
    good = slash and all(t.isascii() and t.isdigit() for t in (i, n)) and int(i) < int(n)
    if not good:
        raise ConfigError(f"--element={element}: write i/n with i from 0 to n - 1, such as 0/4")
    return jobs[int(i) :: int(n)]


def _job(
    plan: Sweep, root: pathlib.Path, variant: str, seed: int, cfg: ExperimentConfig, force: bool
) -> Job:
    workdir = sweep.run_folder(root, variant, seed)
    return Job(
        name=f"{variant}/{workdir.name}",
        workdir=workdir,
        log=sweep.log_file(root, variant, seed),
        flags=(*plan.flags(variant, seed), f"--workdir={workdir}", *(["--force"] * force)),
        steps=cfg.train.steps,
    )


def _plan_table(jobs: list[Job], found: dict, at_once: int) -> Table:
    rows, left = [], 0.0
    for job in jobs:
        finding, at = found[job.workdir.parent.name], progress(job.workdir, job.steps)
        rows.append([job.name, finding.plan, f"{at.step}/{job.steps}", at.state])
        if at.state not in (FINISHED, DIVERGED):
            left += finding.seconds * (1 - at.step / job.steps)
    note = f"Steps left, one run after another: about {seconds_text(left)} by the plan."
    return Table("", ["run", "parameters, memory", "steps", "state"], rows, note)


def _record(plan: Sweep, root: pathlib.Path) -> dict:
    """What sweep.json holds; the variants of an earlier call, of another file say, stay in it."""
    variants = {
        name: {"variant": argument, **overrides}
        for name, (argument, overrides) in plan.variants.items()
    }
    return {
        "config": plan.config,
        "baseline": plan.baseline,
        "variants": {**sweep.read(root).get("variants", {}), **variants},
        "seeds": plan.seeds,
        "common": plan.common,
    }


def _compare(root: pathlib.Path) -> None:
    """Print the comparison of what is finished."""
    from moejax.evals.comparison import compare
    from moejax.evals.comparison_tables import tables

    try:
        found = compare([root])
    except ConfigError as e:  # nothing is finished, or variants have vocabularies of their own
        print(f"no comparison: {e}")
        return
    print("\n" + render(tables(found)), end="")
    print(f"\nmoejax compare {root} --page=comparison.html draws the curves")

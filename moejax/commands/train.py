"""`moejax train`: runs or resumes an experiment, and ends with a report and a sample."""

import pathlib
import sys

from absl import flags, logging

from moejax.commands.flags import define_config, experiment_of, parse_needed

USAGE = """\
usage: moejax train --config=experiments/quickstart.py --workdir=runs/quickstart
       any value of moejax/config.py can be overridden: --config.model.moe.num_experts=64
       the same command again resumes the run in the workdir"""


def main(argv: list[str]) -> int:
    """`moejax train ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    define_config(fv, "Experiment: a Python file with get_config().")
    text("workdir", None, "Folder of the run; resumed if it has one.", flag_values=fv)
    flags.DEFINE_boolean(
        "report", True, "Write report.html and print a sample at the end.", flag_values=fv
    )
    flags.DEFINE_boolean(
        "force", False, "Train although the plan needs more memory than is free.", flag_values=fv
    )
    text(
        "distributed",
        "none",
        "'auto': join the other processes of Slurm, Open MPI, Kubernetes or a TPU pod.",
        flag_values=fv,
    )
    text("coordinator", None, "HOST:PORT of process 0, if no cluster provides it.", flag_values=fv)
    whole("num_processes", None, "With --coordinator.", flag_values=fv)
    whole("process_id", None, "With --coordinator.", flag_values=fv)
    text("wandb", None, "Also log to this project of Weights & Biases.", flag_values=fv)
    text("profile", None, "FIRST:LAST: trace these steps, such as 10:13.", flag_values=fv)
    if not parse_needed("train", USAGE, fv, argv, ("config", "workdir")):
        return 0
    cfg = experiment_of(fv, argv)
    import jax

    from moejax.runs.folder import SaveError
    from moejax.train import processes, profile
    from moejax.train.loop import Diverged, train
    from moejax.train.writers import weights_and_biases

    writers = [weights_and_biases(fv.wandb)] if fv.wandb else []
    traced = profile.steps_of(fv.profile, cfg.train.steps) if fv.profile else None
    logging.set_verbosity(logging.FATAL)  # orbax also logs, at length, every error that it raises
    processes.start(fv.distributed, fv.coordinator, fv.num_processes, fv.process_id)
    workdir = pathlib.Path(fv.workdir)
    several = jax.process_count() > 1
    try:
        results = train(cfg, workdir, force=fv.force, profile=traced, writers=writers)
    except (Diverged, SaveError) as e:
        print(f"moejax train: {e}", file=sys.stderr)
        if several and isinstance(e, SaveError):
            processes.leave(2)
        return 2
    except jax.errors.JaxRuntimeError as e:
        if not several:
            raise
        print(
            f"moejax train: process {jax.process_index()} lost another one, which has ended or cannot be "
            f"reached: {str(e).splitlines()[0][:200]}. The same command in all processes goes on from the "
            "newest checkpoint",
            file=sys.stderr,
        )
        processes.leave(3)
    if processes.is_first() and results:
        _finish(workdir, results, cfg.train.steps, fv.report and jax.process_count() == 1)
    return 0


def _finish(workdir: pathlib.Path, results: dict, steps: int, with_report: bool) -> None:
    from moejax.evals.evaluate import results_table
    from moejax.evals.report import write_report
    from moejax.runs.metrics import last_step
    from moejax.text import render
    from moejax.train.writers import TensorBoard

    print(render([results_table(results, "Held-out documents")]))
    if last_step(workdir) < steps:
        return  # stopped on request: leave at once
    if not with_report:
        print(f"moejax report --workdir={workdir} makes a page of pictures of the run")
        return
    path, samples = write_report(workdir)
    if samples:  # empty if the model cannot generate
        prompt, text = samples[0]
        print(f"A held-out beginning | and how the model goes on:\n{prompt} | {text}\n")
        board = TensorBoard(workdir, None, steps + 1)
        for prompt, text in samples:
            board.sample(steps, prompt, text)
        board.close()
    print(f"report: {path}")

"""The commands: `python -m moejax <command>`, or `moejax <command>`."""

import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from moejax.config import ConfigError, from_config_dict

USAGE = """\
usage: moejax COMMAND [flags]      (moejax COMMAND --help explains each)

  train     --config=experiments/quickstart.py --workdir=runs/quickstart   train or resume a run
  generate  --workdir=runs/quickstart --prompt="def "                      text from a trained run
  plan      MODEL | --config=.. | --hf_config=..                           what a model costs, before it runs
  compare   MODEL MODEL ..                                                 models side by side"""


def train_main(argv: list[str]) -> int:
    """`moejax train`: run an experiment, or go on with the one in the workdir."""
    fv = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment; --config.model.moe.num_experts=32 overrides one value.",
        flag_values=fv,
        sys_argv=["train", *argv],
    )
    flags.DEFINE_string(
        "workdir", None, "Folder of the run; resumed if it has one.", flag_values=fv
    )
    flags.DEFINE_string(
        "distributed",
        "none",
        "'auto': one of several processes, found by Slurm, Open MPI, Kubernetes or a TPU pod.",
        flag_values=fv,
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where no cluster says so.", flag_values=fv
    )
    flags.DEFINE_integer("num_processes", None, "With --coordinator.", flag_values=fv)
    flags.DEFINE_integer("process_id", None, "With --coordinator.", flag_values=fv)
    usage = "usage: moejax train --config=experiments/quickstart.py --workdir=runs/quickstart"
    if any(a in ("--help", "-h") for a in argv):
        print(f"{usage}\n\nFlags:\n{fv.get_help()}")
        return 0
    try:
        fv(["train", *argv])
        config = fv.config
    except (flags.Error, AttributeError, TypeError, ValueError, OSError) as e:
        raise ConfigError(f"{e}\n{usage}") from e
    if config is None or not fv.workdir:
        raise ConfigError(f"train needs --config and --workdir\n{usage}")
    cfg = from_config_dict(config)
    from moejax.train import processes
    from moejax.train.loop import Diverged, train

    processes.start(fv.distributed, fv.coordinator, fv.num_processes, fv.process_id)
    try:
        results = train(cfg, pathlib.Path(fv.workdir))
    except Diverged as e:
        print(f"moejax train: {e}", file=sys.stderr)
        return 3
    if processes.is_first():
        for name, value in results.items():
            print(f"  {name:16} {value:.4f}")
    return 0


def generate_main(argv: list[str]) -> int:
    """`moejax generate`; its module is loaded when called, as JAX is."""
    from moejax.evals import commands

    return commands.generate_main(argv)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(USAGE)
        return 0
    from moejax.cost.commands import compare_main, plan_main

    commands = {
        "train": train_main,
        "generate": generate_main,
        "plan": plan_main,
        "compare": compare_main,
    }
    if command not in commands:
        print(f"moejax: unknown command {command!r}\n{USAGE}", file=sys.stderr)
        return 2
    try:
        return commands[command](rest)
    except ConfigError as e:
        print(f"moejax {command}: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

"""The commands: `python -m moejax <command>`, or `moejax <command>`."""

import difflib
import importlib
import os
import sys

from moejax.commands import compile_cache
from moejax.options import ConfigError

USAGE = """\
usage: moejax COMMAND [flags]      (moejax COMMAND --help explains each)

  train     --config=experiments/quickstart.py --workdir=runs/quickstart   train or resume a run
  sweep     --config=experiments/quickstart.py --workdir=runs/sweep        variants and seeds, what is missing
  ladder    --config=experiments/quickstart.py --workdir=.. --heads=2,3,4  baseline and variant at several sizes
  evaluate  --workdir=runs/quickstart                                      loss of held-out text, by domain
  generate  --workdir=runs/quickstart --prompt="def "                      text from a trained run
  report    --workdir=runs/quickstart                                      a page of pictures of a run
  analyze   --workdir=runs/quickstart                                      what experts do, beside chance
  knockout  --workdir=runs/quickstart                                      loss against experts taken away
  rebalance --workdir=runs/quickstart --devices=8                          experts on devices with equal loads
  routes    --workdir=runs/quickstart --text="def f(x):"                   which experts each token has
  import    --hf_dir=DIR --workdir=runs/model                              a run from a Hugging Face folder
  export    --workdir=runs/model --hf_dir=DIR                              a Hugging Face folder from a run
  routers   [NAME]                                                         the table of routers, or one's page
  plan      MODEL | --config=.. | --hf_config=..                           what a model costs, before it runs
  compare   RUN RUN .. | SWEEP                                             runs and seeds side by side
  models    MODEL MODEL ..                                                 published models side by side"""


# The module of each command, imported when it is called: --help needs no JAX.
COMMANDS = {
    "train": "moejax.commands.train",
    "sweep": "moejax.commands.sweep",
    "ladder": "moejax.commands.ladder",
    "evaluate": "moejax.commands.evaluate",
    "generate": "moejax.commands.generate",
    "report": "moejax.commands.report",
    "analyze": "moejax.commands.analyze",
    "knockout": "moejax.commands.knockout",
    "rebalance": "moejax.commands.rebalance",
    "routes": "moejax.commands.routes",
    "import": "moejax.commands.import_",
    "export": "moejax.commands.export",
    "routers": "moejax.commands.routers",
    "plan": "moejax.commands.plan",
    "models": "moejax.commands.models",
    "compare": "moejax.commands.compare",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("--help", "-h", "help"):
        print(USAGE)
        return 0
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        print(f"moejax: unknown command {command!r}{hint}\n{USAGE}", file=sys.stderr)
        return 2
    try:
        compile_cache.turn_on()  # before a command imports JAX
        code = importlib.import_module(COMMANDS[command]).main(rest)
        sys.stdout.flush()
        return code
    except ConfigError as e:
        print(f"moejax {command}: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # outside of training's steps, which save first
        print(f"\nmoejax {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `| head` has seen enough; nor may the exit flush complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.filename is None:
            raise
        print(f"moejax {command}: {e.filename}: {e.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

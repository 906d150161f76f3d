"""Whether experiments can run on the devices at hand, in a process that leaves the devices free when it ends.

python -m moejax.train.fits < configs.json > findings.json
"""

import json
import os
import subprocess
import sys
from typing import NamedTuple

from moejax.config import ConfigError, ExperimentConfig
from moejax.config_io import from_stored, to_json
from moejax.text import bytes_text, count_text


class Finding(NamedTuple):
    """Attributes:
    problem: why the experiment cannot run here; '' if it can.
    plan: its size and memory, as text.
    seconds: that its steps are estimated to take.
    """

    problem: str
    plan: str
    seconds: float


def find(configs: list[ExperimentConfig], jobs: int) -> list[Finding]:
    """A finding for each config, if `jobs` of them run at once. ConfigError if the devices do not answer."""
    asked = json.dumps({"jobs": jobs, "configs": [json.loads(to_json(c)) for c in configs]})
    done = subprocess.run(
        [sys.executable, "-m", "moejax.train.fits"],
        input=asked,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ConfigError(f"the devices of this machine cannot be asked: {last}")
    return [Finding(*row) for row in json.loads(done.stdout.splitlines()[-1])]


def _finding(cfg: ExperimentConfig, jobs: int) -> Finding:
    from moejax.cost.architecture import counts
    from moejax.cost.receipt import plan_run
    from moejax.data.vocabulary import expected_tokens, with_vocabulary
    from moejax.sharding import make_layout
    from moejax.train.loop import check_here

    try:
        cfg = with_vocabulary(cfg, expected_tokens(cfg.data))
        check_here(cfg)
        plan = plan_run(cfg, make_layout(cfg))
    except ConfigError as e:
        return Finding(str(e), "", 0.0)
    size = counts(plan.arch)["with embeddings"]
    problem = plan.problem(jobs)
    text = f"{count_text(size.total)} ({count_text(size.active)} active), {bytes_text(plan.memory.total)}"
    return Finding(problem, text, (plan.setup.tokens or 0) / plan.step.tokens_per_second)


def main() -> None:
    asked = json.load(sys.stdin)
    found = [_finding(from_stored(c), asked["jobs"]) for c in asked["configs"]]
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()

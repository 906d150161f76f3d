"""The examples in launch/ are run, with stand-ins for the schedulers and for moejax, which notes how it was
called; what it was called with must be a run that works on the number of devices in the example."""

import os
import pathlib
import subprocess

import jax
import pytest
import yaml

from moejax.commands import train
from moejax.sharding import make_layout
from moejax.train import loop, processes

ROOT = pathlib.Path(__file__).parent.parent.parent
STAND_INS = {
    "moejax": 'printf "%s\\n" "$@" > "$CALLED"',
    "srun": 'exec "$@"',
    "scontrol": 'echo "$@" > "$CALLED.requeued"',
    # Open MPI: everything before the program is its own; the program learns its rank.
    "mpirun": 'while [ "$1" != bash ]; do shift; done\n'
    'export FIRST=node0 OMPI_COMM_WORLD_SIZE=16 OMPI_COMM_WORLD_RANK=3 OMPI_COMM_WORLD_LOCAL_RANK=3\nexec "$@"',
    "gcloud": 'for a in "$@"; do case "$a" in --command=*) cd && bash -c "${a#--command=}";; esac; done',
    "mountpoint": "exit 1",
    "gcsfuse": "exit 0",
}
ENVIRONMENT = {
    "HOSTS": "node0:8,node1:8",
    "TPU": "pod",
    "ZONE": "zone",
    "BUCKET": "bucket",
    "SLURM_JOB_ID": "7",
    "JOB_COMPLETION_INDEX": "2",
}


def called_by(example, folder):
    """The arguments that moejax gets when the example is run in an empty folder."""
    stand_ins = folder / "bin"
    stand_ins.mkdir()
    for name, script in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/bin/bash\n{script}\n")
        (stand_ins / name).chmod(0o755)
    path = ROOT / "launch" / example
    command = [str(path)]
    if path.suffix == ".yaml":
        job = list(yaml.safe_load_all(path.read_text()))[1]
        container = job["spec"]["template"]["spec"]["containers"][0]
        command = container["command"] + container["args"]
    env = {
        "PATH": f"{stand_ins}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "CALLED": str(folder / "called"),
    }
    subprocess.run(command, cwd=folder, env=env | ENVIRONMENT, timeout=60, check=False)
    return (folder / "called").read_text().splitlines()


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections'
@pytest.mark.parametrize(
    ("example", "devices", "start"),
    [
        ("slurm.sh", 32, ("auto", None, None, None)),
        ("kubernetes.yaml", 32, ("none", "moejax-0.moejax:7777", 4, 2)),
        ("mpi.sh", 16, ("none", "node0:7777", 16, 3)),
        ("tpu.sh", 16, ("auto", None, None, None)),
    ],
)
def test_the_examples_start_a_run_that_works(example, devices, start, tmp_path, monkeypatch):
    command, *args = called_by(example, tmp_path)
    assert command == "train"
    seen = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(processes, "start", lambda *given: seen.append(given))
    monkeypatch.setattr(loop, "train", lambda *given, **how: seen.append(given) or {})
    assert train.main(args) == 0
    assert seen[0] == start
    cfg, workdir = seen[1]
    assert workdir.name == "quickstart"
    layout = make_layout(cfg, jax.devices()[:1] * devices)  # raises if it does not fit
    assert layout is not None and layout.mesh.size == devices


def test_slurm_queues_the_rest_of_a_run_that_was_stopped(tmp_path):
    called_by("slurm.sh", tmp_path)
    assert (tmp_path / "called.requeued").read_text() == "requeue 7\n"


def test_every_example_is_listed():
    readme = (ROOT / "launch" / "README.md").read_text()
    for path in (ROOT / "launch").iterdir():
        assert path.name == "README.md" or f"]({path.name})" in readme

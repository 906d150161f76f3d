"""Memory that is free: of the machine, and within limits of containers; and a plan that needs more."""

import dataclasses
import re

import pytest

from moejax.config import ConfigError, DataConfig, ExperimentConfig, ModelConfig, TrainConfig
from moejax.cost import hardware, receipt
from moejax.cost.available import available_memory, physical_memory
from moejax.train import loop


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))


def test_the_least_of_machine_and_control_groups(tmp_path):
    meminfo, own, groups = tmp_path / "meminfo", tmp_path / "own", tmp_path / "groups"

    def left() -> float:
        return available_memory(meminfo, own, groups)

    assert left() == physical_memory()  # nothing is known
    meminfo.write_text("MemTotal: 9 kB\nMemFree: 1 kB\nMemAvailable: 1000000 kB\n")
    assert left() == 1000 * 1024 * 1000
    # Version 2: the tightest group on the way up; what is only cached can be had.
    own.write_text("0::/a/b\n")
    write(groups / "a" / "b", memory__max="max", memory__current=1)
    assert left() == 1000 * 1024 * 1000
    write(groups / "a", memory__max=500_000, memory__current=400_000)
    assert left() == 100_000
    write(groups / "a", memory__stat="anon 7\ninactive_file 50000\n")
    assert left() == 150_000
    write(
        groups, memory__max=1000, memory__current=100
    )  # of the container that sees itself as the root
    assert left() == 900
    # Version 1, with its memory controller in a folder of its own.
    own.write_text("3:cpu:/x\n7:memory:/y\n")
    write(groups / "memory" / "y", memory__limit_in_bytes=800, memory__usage_in_bytes=100)
    assert left() == 700
    write(groups / "memory" / "y", memory__limit_in_bytes="no number")
    assert left() == 1000 * 1024 * 1000


CFG = ExperimentConfig(
    model=ModelConfig(vocab_size=258, d_model=64, num_layers=8, num_dense_layers=8, d_ff=256),
    data=DataConfig(tokenizer="byte", seq_len=256, batch_size=64),
)


def with_memory(monkeypatch, size: float, cfg=CFG) -> receipt.RunPlan:
    monkeypatch.setattr(hardware, "available_memory", lambda: size * hardware._sharing())
    monkeypatch.setattr(hardware, "matmul_peak", lambda _: 1e10)
    monkeypatch.setattr(hardware, "copy_bandwidth", lambda: 1e10)
    return receipt.plan_run(cfg, None)


def test_a_plan_that_does_not_fit_names_the_nearest_that_does(monkeypatch, tmp_path):
    whole = with_memory(monkeypatch, 1e12)
    assert whole.problem() == ""
    assert "a share of 1000000 at once" in whole.problem(1_000_000)
    need = whole.memory.total
    assert with_memory(monkeypatch, need / 0.89).problem() == ""  # 90% of a device are usable
    problem = with_memory(monkeypatch, need / 2).problem()
    flags = dict(re.findall(r"--config\.(\S+)=(\S+)", problem))
    assert flags and flags.keys() <= {"train.accumulation", "compute.remat"}, problem
    # What it offers fits.
    fitting = dataclasses.replace(
        CFG,
        compute=dataclasses.replace(CFG.compute, remat=flags.get("compute.remat", "none")),
        train=TrainConfig(accumulation=int(flags.get("train.accumulation", 1))),
    )
    assert with_memory(monkeypatch, need / 2, fitting).problem() == ""
    assert "Nothing near it fits" in with_memory(monkeypatch, 1000).problem()


def test_training_is_refused_before_anything_is_written_unless_forced(monkeypatch, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n\n\n" * 2000)
    data = dataclasses.replace(CFG.data, sources=(f"a={tmp_path}/a.txt",), validation_fraction=0.5)
    cfg = dataclasses.replace(CFG, data=data, mesh=dataclasses.replace(CFG.mesh, data=1))
    with_memory(monkeypatch, 1e6)
    with pytest.raises(ConfigError, match=r"does not fit: it needs about .* --force tries it"):
        loop.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert loop._plan(cfg, None, force=True).problem()

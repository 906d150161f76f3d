"""The GPU benchmark cannot run here; its layer must at least lower for CUDA, at full sizes, and all of it must
run at toy sizes on a CPU."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Unoptimised code is compiled faster, and is as good here.
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


@pytest.mark.parametrize("implementation", ["auto", "ragged"])
def test_gpu_layer_lowers_for_cuda(monkeypatch, implementation):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks import moe_layer

    for case in (moe_layer.Case(4096, 7168, 2048, 32, 8), moe_layer.Case(4096, 4096, 14336, 8, 2)):
        functions = {}

        def arguments(case=case, functions=functions):
            _, functions["step"], args = moe_layer.layer(case, jnp.bfloat16, implementation)
            return args

        args = jax.eval_shape(arguments)  # shapes only: the weights would take gigabytes
        lowered = jax.jit(functions["step"]).trace(*args).lower(lowering_platforms=("cuda",))
        assert "ragged_dot" in lowered.as_text()


@pytest.mark.product
def test_the_gpu_script_runs_on_a_cpu_and_says_what_failed(tmp_path):
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--on_cpu", "--repeats=1"]
    done = subprocess.run(
        [*command, f"--json={output}"],
        cwd=ROOT,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    tables = {t["title"]: t["rows"] for t in json.loads(output.read_text())}
    assert len(tables) == 7
    # bfloat16 rounds each product of 16 or 64 terms once, to 8 bits: 2^-8 of the largest and a little more.
    errors = [float(r["relative error"]) for r in tables["Grouped products"]]
    assert len(errors) == 6 and max(errors) < 0.01
    failed = [r for rows in tables.values() for r in rows if r.get("failed")]
    assert [r["attention"] for r in failed] == ["cuDNN"]  # there is none on a CPU


def test_full_width_needs_a_python_with_torch():
    """It builds its own model first: all but the peer."""
    command = [sys.executable, "-m", "benchmarks.full_width", "--tiny", "--dtypes=float32"]
    done = subprocess.run(
        [*command, "--torch_python=/bin/false"], cwd=ROOT, env=ENV, capture_output=True, text=True
    )
    assert done.returncode and "--torch_python=PATH" in done.stderr


@pytest.mark.product
@pytest.mark.parametrize("mode", [["--forms=bfloat16,int4", "--batches=1"], ["--whole"]])
def test_decoding_at_real_widths_at_toy_sizes(tmp_path, mode):
    output = tmp_path / "sizes.json"
    command = [sys.executable, "-m", "benchmarks.real_size", "--tiny", "--repeats=1", "--new=4"]
    subprocess.run([*command, *mode, f"--json={output}"], cwd=ROOT, env=ENV, check=True)
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 2
    speed = rows[1].get("tokens/s") or rows[1]["measured"]
    assert math.isfinite(float(speed))  # of toys, the difference of two times may be anything

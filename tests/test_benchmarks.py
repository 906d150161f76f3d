"""The GPU benchmark cannot run here; it must at least lower for CUDA, at its full sizes."""

import pathlib

import jax
import jax.numpy as jnp
import pytest


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent.parent)
    import benchmarks.layer

    return benchmarks.layer


@pytest.mark.parametrize("implementation", ["auto", "ragged"])
def test_gpu_layer_lowers_for_cuda(layer, implementation):
    for case in layer.GPU_CASES:
        functions = {}

        def arguments(case=case, functions=functions):
            _, functions["step"], args = layer.layer(case, jnp.bfloat16, implementation)
            return args

        args = jax.eval_shape(arguments)  # shapes only: the weights would take gigabytes
        lowered = jax.jit(functions["step"]).trace(*args).lower(lowering_platforms=("cuda",))
        assert "ragged_dot" in lowered.as_text()

"""LatentMoE (2601.18089): experts between two projections, router and shared experts at full width."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from moejax.config import ComputeConfig, ModelConfig, MoEConfig
from moejax.cost.architecture import of_model
from moejax.cost.flops import paper_flops
from moejax.models import zoo
from moejax.moe import layer
from moejax.options import ConfigError
from moejax.params import init_params
from tests.flat import experiment

D, L, F, E = 6, 3, 4, 4
CFG = ModelConfig(
    d_model=D,
    init_std=0.7,
    moe=MoEConfig(num_experts=E, d_expert=F, shared_experts=1, latent_dim=L),
)


def numpy_layer(p, x_TD):
    """y = shared(x) + W_up sum_k g_k E_k(W_down x), g_k the two largest of softmax(x W_r), one token at a
    time."""

    def ffn(w, x):
        gate = x @ w["w_gate"]
        return (gate / (1 + np.exp(-gate)) * (x @ w["w_up"])) @ w["w_down"]

    y_TD = []
    for x in x_TD:
        scores = np.exp(x @ p["router"]["kernel"])
        scores /= scores.sum()
        low = x @ p["latent_down"]
        out = sum(
            scores[e] * ffn({k: w[e] for k, w in p["experts"].items()}, low)
            for e in np.argsort(-scores)[:2]
        )
        y_TD.append(ffn(p["shared"], x) + out @ p["latent_up"])
    return np.stack(y_TD)


@pytest.mark.parametrize("dispatcher", ["auto", "dense"])
def test_value_and_gradients(dispatcher):
    params = init_params(layer.param_specs(CFG), jax.random.key(0))
    x_BSD = jax.random.normal(jax.random.key(1), (1, 5, D))
    target = np.random.default_rng(0).normal(size=(1, 5, D))
    compute = ComputeConfig(dispatcher=dispatcher)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(p):
        y, _ = layer.moe(p, {}, x_BSD, CFG, compute=compute)
        return (y * target).sum(), y

    arrays = jax.tree.map(lambda a: np.array(a, np.float64), params)
    x_TD = np.array(x_BSD[0], np.float64)
    (_, y), got = run(params)
    np.testing.assert_allclose(y[0], numpy_layer(arrays, x_TD), rtol=1e-4, atol=1e-5)
    for part, name in (("latent_down", None), ("latent_up", None), ("router", "kernel")):
        array = arrays[part] if name is None else arrays[part][name]
        gradient = got[part] if name is None else got[part][name]
        for at in np.ndindex(array.shape):
            old, values = array[at], []
            for move in (1e-6, -1e-6):
                array[at] = old + move
                values.append((numpy_layer(arrays, x_TD) * target[0]).sum())
            array[at] = old
            # float32 against central differences of about 1e-9.
            want = (values[0] - values[1]) / 2e-6
            assert gradient[at] == pytest.approx(want, rel=1e-3, abs=1e-4), (part, at)


def test_what_it_costs():
    """Per layer: 2 D L in the projections, which every token uses; 3 L F for each expert, two of them used;
    3 D F for the shared one, at full width."""
    cfg = dataclasses.replace(CFG, num_layers=3, num_dense_layers=1)
    arch = of_model(cfg)
    parts = {
        name: arch.part(name) for name in ("latent projections", "routed experts", "shared experts")
    }
    assert {n: (p.total, p.active_matrix) for n, p in parts.items()} == {
        "latent projections": (2 * 2 * D * L, 2 * 2 * D * L),
        "routed experts": (2 * E * 3 * L * F, 2 * 2 * 3 * L * F),
        "shared experts": (2 * 3 * D * F, 2 * 3 * D * F),
    }
    assert paper_flops(cfg, 8) is None
    # In the paper's convention, 6 P a token: the projections, two experts, the shared one.
    plain = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, d_expert=0))
    ffns = paper_flops(cfg, 8, ideal=False) - paper_flops(plain, 8, ideal=False)
    assert ffns == 8 * 3 * 6 * (2 * 3 * L * F + 3 * D * F)


def test_it_is_no_published_family():
    cfg = experiment(vocab_size=64, num_experts=4, d_expert=8, latent_dim=8).model
    with pytest.raises(ConfigError, match="latent_dim"):
        zoo.config_to_hf(cfg, "deepseek")

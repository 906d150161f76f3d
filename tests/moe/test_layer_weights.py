"""Weights that go elsewhere than on an expert's output: on its input, and on shared experts. The layer beside
NumPy, one route at a time, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ComputeConfig, ModelConfig, MoEConfig, ObjectiveConfig
from moejax.moe import layer
from moejax.params import init_params
from moejax.routers import router_options

B, S, D, F, E = 2, 3, 4, 3, 3


def config(name, **options) -> ModelConfig:
    router = router_options(name, **options)
    moe = MoEConfig(num_experts=E, d_expert=F, shared_experts=2, router=router, ffn_bias=True)
    return ModelConfig(d_model=D, init_std=0.7, moe=moe)


def ffn(w, x_D, each=(1.0,)):
    """`each`: the weights of the equal parts of its width."""
    gate, up = x_D @ w["w_gate"] + w["b_gate"], x_D @ w["w_up"] + w["b_up"]
    h = gate / (1 + np.exp(-gate)) * up * np.repeat(each, len(gate) // len(each))
    return h @ w["w_down"] + w["b_down"]


def llama4(p, x_D):
    """y = shared(x) + sum over the two largest z of E_i(sigmoid(z_i) x)."""
    z = x_D @ p["router"]["kernel"]
    y = ffn(p["shared"], x_D)
    for e in np.argsort(-z)[:2]:
        y = y + ffn({k: a[e] for k, a in p["experts"].items()}, x_D / (1 + np.exp(-z[e])))
    return y


def inkling(p, x_D):
    """Sigmoids of the two chosen and the two shared, over their sum, times 8 and a learned factor."""
    s = 1 / (1 + np.exp(-x_D @ p["router"]["kernel"]))
    chosen = np.argsort(-s[:E])[:2]
    factor = 8 * p["router"]["scale"][0] / (s[chosen].sum() + s[E:].sum())
    y = ffn(p["shared"], x_D, factor * s[E:])
    for e in chosen:
        y = y + factor * s[e] * ffn({k: a[e] for k, a in p["experts"].items()}, x_D)
    return y


@pytest.mark.parametrize("how", ["dropless", "dense", "slots"])
@pytest.mark.parametrize("name", ["llama4", "inkling"])
def test_values_and_gradients(name, how):
    cfg = config(name)
    objective = ObjectiveConfig(capacity_factor=3.0 if how == "slots" else 0.0)  # holds every token
    compute = ComputeConfig(dispatcher="dense" if how == "dense" else "auto")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(layer.param_specs(cfg), jax.random.key(0)))
    params = jax.tree.map(lambda a: rng.normal(size=a.shape), shapes)
    x_BSD, target = rng.normal(size=(2, B, S, D))
    state = {"expert_bias": jnp.zeros(E)} if name == "inkling" else {}

    def loss(p, x):
        y, aux = layer.moe(p, state, x, cfg, objective=objective, compute=compute)
        return (y * target).sum(), (y, aux)

    with jax.enable_x64(True):
        exact = jax.tree.map(jnp.asarray, (params, x_BSD))
        f = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (_, (y, aux)), got = jax.device_get(f(*exact))
    one = {"llama4": llama4, "inkling": inkling}[name]

    def numpy_y(p, x):
        return np.reshape([one(p, x_D) for x_D in x.reshape(-1, D)], x.shape)

    np.testing.assert_allclose(y, numpy_y(params, x_BSD), rtol=1e-9, atol=1e-12)
    assert aux.stats["dropped"] == aux.stats["stray"] == 0
    # Along three random directions instead of each of some hundred elements. Step 1e-6: error about 1e-9.
    for seed in range(3):
        rng = np.random.default_rng(seed)
        way = jax.tree.map(lambda a, rng=rng: rng.normal(size=a.shape), (params, x_BSD))
        moved = [
            (
                numpy_y(*jax.tree.map(lambda a, w, d=d: a + d * w, (params, x_BSD), way)) * target
            ).sum()
            for d in (1e-6, -1e-6)
        ]
        along = sum((g * w).sum() for g, w in zip(*map(jax.tree.leaves, (got, way)), strict=True))
        np.testing.assert_allclose(along, (moved[0] - moved[1]) / 2e-6, rtol=1e-6, atol=1e-6)


def test_first_choices_find_their_slots_before_second_ones():
    """C = ceil(0.5 * 2 * 2 / 2) = 1 slot for each of two experts. Token 0 chooses 0 then 1, token 1 chooses 1
    then 0: the first choices stay, the second ones are dropped, as where outputs are weighed."""
    moe = MoEConfig(num_experts=2, d_expert=F, router=router_options("llama4"), ffn_bias=True)
    cfg = ModelConfig(d_model=2, init_std=0.7, moe=moe)
    params = init_params(layer.param_specs(cfg), jax.random.key(0))
    params["router"]["kernel"] = jnp.eye(2)
    x_BSD = jnp.array([[[1.0, 0.5], [0.5, 1.0]]])
    y, aux = layer.moe(params, {}, x_BSD, cfg, objective=ObjectiveConfig(capacity_factor=0.5))
    assert aux.stats["dropped"] == 2
    w = jax.tree.map(np.asarray, params["experts"])
    for t in range(2):
        x_D = np.asarray(x_BSD[0, t]) / (1 + np.exp(-1.0))
        want = ffn({k: a[t] for k, a in w.items()}, x_D)
        np.testing.assert_allclose(y[0, t], want, rtol=1e-5, atol=1e-6)

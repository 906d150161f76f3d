"""Schedules at the steps where they turn, and what each optimiser does to each kind of parameter, by effect."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from every_parameter import BIASED, MLA, drawn, leaves, options

from moejax.config import ConfigError, OptimizerConfig
from moejax.config_checks import READS
from moejax.config_io import from_config_dict
from moejax.cost import memory
from moejax.models import transformer
from moejax.params import ParamSpec, by_path, path_name
from moejax.train.optimizer import OPTIMIZERS, bounded, make_optimizer, schedule

PEAK = 0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Warm-up over 10 steps begins at a tenth; x 0.316 at 80% and again at 90% (2401.06066 4.1.3).
        (
            dict(schedule="multistep"),
            {0: 0.1, 4: 0.5, 9: 1, 79: 1, 80: 0.316, 89: 0.316, 90: 0.316**2, 99: 0.316**2},
        ),
        (dict(schedule="constant"), {0: 0.1, 9: 1, 10: 1, 99: 1}),
        (dict(schedule="constant", warmup_steps=0), {0: 1, 99: 1}),
        # Half way down the cosine at step 10 + 45; the last step has nearly arrived at a tenth.
        (dict(schedule="cosine"), {9: 1, 10: 1, 55: 0.55, 100: 0.1}),
        # Stable to 80%, then straight down to a tenth.
        (dict(schedule="wsd", decay_at=(0.8,)), {9: 1, 80: 1, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules(options, expected):
    cfg = OptimizerConfig(**({"learning_rate": PEAK, "warmup_steps": 10} | options))
    rate = schedule(cfg, 100)
    got = {step: float(rate(step)) / PEAK for step in expected}
    assert got == pytest.approx(expected, rel=1e-5)


MODELS = pytest.mark.parametrize("model", [BIASED, MLA], ids=["biased", "mla"])
NAMES = pytest.mark.parametrize("name", OPTIMIZERS)
V4 = ((8, 3.4445, -4.775, 2.0315), (2, 2.0, -1.5, 0.5))


def updates_of(cfg: OptimizerConfig, specs, grads, params, steps: int = 1):
    """The last of `steps` updates with the same gradients."""
    optimizer = make_optimizer(cfg, specs, 100)

    @jax.jit
    def run(grads, params):
        state = optimizer.init(params)
        for _ in range(steps):
            updates, state = optimizer.update(grads, state, params)
        return updates

    return leaves(run(grads, params))


@MODELS
def test_roles(model):
    special = {
        "embed/tokens": "embedding",
        "embed/positions": "embedding",
        "head": "head",
        "kernel": "router",
        "shared_gate": "router",
        "proj": "matrix",
    }
    seen = set()
    for path, spec in by_path(transformer.param_specs(model)).items():
        last = path.rsplit("/", 1)[-1]
        matrix = "matrix" if last.startswith("w_") else "vector"
        assert spec.role == special.get(path, special.get(last, matrix)), path
        stacked, expert = path.startswith(("dense_", "moe_", "mtp")), "experts/" in path
        assert spec.batch_dims == stacked + expert, path
        seen.add((spec.role, spec.batch_dims))
    assert {("matrix", 1), ("matrix", 2), ("vector", 0), ("vector", 1), ("vector", 2)} < seen


@NAMES
@MODELS
def test_all_but_vectors_decay(model, name):
    """Without a gradient, decay is all that moves a parameter: by learning rate x weight decay."""
    specs = transformer.param_specs(model)
    params = drawn(specs, 0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    got = updates_of(options(name=name, weight_decay=0.5), specs, zeros, params)
    for path, spec in by_path(specs).items():
        want = 0.0 if spec.role == "vector" else -0.1 * 0.5 * leaves(params)[path]
        np.testing.assert_allclose(got[path], want + 0 * got[path], rtol=1e-6, err_msg=path)


def newton_schulz(g: np.ndarray, rows) -> np.ndarray:
    """One matrix, in float64: X -> a X + (b A + c A^2) X with A = X X^T, from X = G / |G|."""
    x = g.astype(np.float64) / np.linalg.norm(g)
    for times, a, b, c in rows:
        for _ in range(int(times)):
            s = x @ x.T
            x = a * x + (b * s + c * s @ s) @ x
    return x


@pytest.mark.parametrize("rms", [0.0, 0.2])
@pytest.mark.parametrize("rows", [OptimizerConfig().newton_schulz, V4], ids=["standard", "v4"])
@MODELS
def test_muon_takes_each_matrix_by_itself(model, rows, rms):
    """optax's muon, left to itself, takes what has two axes: it would orthogonalise the stacked norms (L, D),
    the embedding and the head, and leave every stacked matrix to Adam. A stack that is orthogonalised as one
    matrix, or divided by one norm, has other singular values in each."""
    specs = transformer.param_specs(model)
    params, grads = drawn(specs, 0), drawn(specs, 1)
    cfg = options(name="muon", weight_decay=0.0, newton_schulz=rows, consistent_rms=rms)
    got = updates_of(cfg, specs, grads, params)
    adamw = updates_of(dataclasses.replace(cfg, name="adamw"), specs, grads, params)
    count = 0
    for path, spec in by_path(specs).items():
        if spec.role != "matrix":
            np.testing.assert_array_equal(got[path], adamw[path], err_msg=path)
            continue
        n_in, n_out = spec.shape[-2:]
        scale = rms * max(n_in, n_out) ** 0.5 if rms else max(1, n_out / n_in) ** 0.5
        one = got[path].reshape(-1, n_in, n_out) / (-0.1 * scale)
        for mine, g in zip(one, leaves(grads)[path].reshape(-1, n_in, n_out), strict=True):
            # Small singular values grow by up to 3.4 an iteration, and their float32 errors of 1e-7 of the
            # norm with them: 5 iterations x500, 8 x2e4 at most where one begins near zero.
            np.testing.assert_allclose(mine, newton_schulz(g, rows), atol=3e-3, err_msg=path)
            if rows == V4:  # its last two iterations converge
                sizes = np.linalg.svd(mine, compute_uv=False)
                np.testing.assert_allclose(sizes, 1, atol=0.02, err_msg=path)
            count += 1
    assert count > 40


def test_muon_takes_what_it_is_asked_to():
    specs = transformer.param_specs(BIASED)
    params, grads = drawn(specs, 0), drawn(specs, 1)
    cfg = options(name="muon", muon_roles=("router", "head"))
    got, adamw = (
        updates_of(dataclasses.replace(cfg, **c), specs, grads, params)
        for c in ({}, {"name": "adamw", "muon_roles": ("matrix",)})
    )
    # Two programs round Adam's square root and quotient apart; Muon's updates are others altogether.
    differ = {p for p, a in got.items() if not np.allclose(a, adamw[p], rtol=1e-5, atol=0)}
    assert differ == {p for p, s in by_path(specs).items() if s.role in cfg.muon_roles}


def test_adafactor_factors_each_matrix():
    """A layer's expert has the update that optax gives to it alone. The stack as a whole would be factored over
    the same axes, but clipped by the RMS of all; with 200 experts it would be factored over experts."""
    spec = ParamSpec((2, 3, 130, 140), ("layers", "expert", None, None))
    scale = np.arange(1, 4, dtype=np.float32)[None, :, None, None]
    grads = {"w": drawn({"w": spec}, 1)["w"] * scale}
    params = drawn({"w": spec}, 0)
    got = updates_of(options(name="adafactor", weight_decay=0.0), {"w": spec}, grads, params, 2)
    alone = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    for i in np.ndindex(2, 3):
        g, p = grads["w"][i], params["w"][i]
        _, state = alone.update(g, alone.init(p), p)
        # The same products in a batch: float32 roundings.
        want = -0.1 * alone.update(g, state, p)[0]
        np.testing.assert_allclose(got["w"][i], want, rtol=1e-5, atol=1e-7)
    assert memory.moments_of(OptimizerConfig(name="adafactor"), spec) == 6 * 270


CHANGES = {
    "b1": 0.5,
    "b2": 0.5,
    "eps": 1.0,
    "weight_decay": 1.0,
    "momentum": 0.5,
    "newton_schulz": V4,
    "consistent_rms": 0.2,
    "muon_roles": ("matrix", "router"),
}


@NAMES
def test_an_optimizer_reads_what_it_says(name):
    """An option in READS changes the second step, others do not, and are refused."""
    assert READS.keys() == OPTIMIZERS.keys()
    assert set(CHANGES) == {key for keys in READS.values() for key in keys}
    specs = {
        "w": ParamSpec((2, 4, 6), ("layers", None, None)),
        "r": ParamSpec((4, 3), (None, None), role="router"),
        "b": ParamSpec((4,), (None,)),
    }
    params, grads = drawn(specs, 0), drawn(specs, 1)
    optimizer = {c: options(name=name, **({c: CHANGES[c]} if c else {})) for c in ("", *CHANGES)}
    got = {c: _last(o, specs, grads, params) for c, o in optimizer.items()}
    for key, value in CHANGES.items():
        same = all((a == got[""][p]).all() for p, a in got[key].items())
        assert same == (key not in READS[name]), key
        if same:
            text = rf"optimizer.{key}=.* is not read by optimizer.name='{name}' but by '"
            with pytest.raises(ConfigError, match=text) as e:
                from_config_dict({"optimizer": {"name": name, key: value}})
            assert all(f"'{n}'" in str(e.value) for n, keys in READS.items() if key in keys)
        else:
            from_config_dict({"optimizer": {"name": name, key: value}})


def _last(cfg, specs, grads, params):
    """The second of two updates, with another gradient than the first."""
    optimizer = make_optimizer(cfg, specs, 100)
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params)
    return leaves(optimizer.update(grads, state, params)[0])


def test_optimizer_options_are_checked():
    for values, text in [
        ({"name": "muno"}, "did you mean 'muon'"),
        ({"name": "muon", "newton_schulz": [[2.5, 1, 1, 1]]}, r"rows \(times, a, b, c\)"),
        ({"name": "muon", "newton_schulz": [[2, 1, 1]]}, r"rows \(times, a, b, c\)"),
        ({"name": "muon", "newton_schulz": []}, r"rows \(times, a, b, c\)"),
        ({"name": "muon", "newton_schulz": [["5", 1, 1, 1]]}, "tuple of tuples of floats"),
        ({"name": "muon", "muon_roles": ["vector"]}, "matrix, embedding, head, router"),
    ]:
        with pytest.raises(ConfigError, match=text):
            from_config_dict({"optimizer": values})


def test_adamw_is_what_it_was():
    """Bit for bit, state included: clipping, and optax's adamw with a mask from paths and numbers of axes."""
    specs = transformer.param_specs(BIASED)
    cfg = OptimizerConfig(warmup_steps=2)

    def mask(params):
        def one(path, a):
            names = path_name(path).split("/")
            stacked = names[0] in ("dense_blocks", "moe_blocks", "mtp")
            return a.ndim - stacked >= 2 and not names[-1].startswith("b_")

        return jax.tree_util.tree_map_with_path(one, params)

    rate = schedule(cfg, 10)
    old = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, 0.9, 0.95, 1e-8, mu_dtype=jnp.float32, weight_decay=0.1, mask=mask),
    )

    def run(optimizer):
        @jax.jit
        def step(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params = drawn(specs, 0)
        state = optimizer.init(params)
        for i in range(3):
            params, state = step(params, state, drawn(specs, 1 + i))
        return params, state

    chex.assert_trees_all_equal(run(make_optimizer(cfg, specs, 10)), run(old))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_two_steps_of_adamw_by_hand(clip):
    cfg = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, schedule="constant", clip_norm=clip, weight_decay=0.5
    )
    specs = {"w": ParamSpec((1, 2), (None, None)), "b_up": ParamSpec((1,), (None,))}
    optimizer = make_optimizer(cfg, specs, 100)
    params = {"w": np.array([[1.0, -2.0]], np.float32), "b_up": np.array([3.0], np.float32)}
    grads = {"w": np.array([[3.0, 0.0]], np.float32), "b_up": np.array([4.0], np.float32)}  # norm 5
    state = optimizer.init(params)
    want = {k: v.astype(np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(p, np.float64) for k, p in params.items()} for _ in range(2))
    for t in (1, 2):
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(np.add, params, updates)
        for k in want:
            g = grads[k] / (5.0 if clip else 1.0)
            m[k] = cfg.b1 * m[k] + (1 - cfg.b1) * g
            v[k] = cfg.b2 * v[k] + (1 - cfg.b2) * g**2
            step = m[k] / (1 - cfg.b1**t) / (np.sqrt(v[k] / (1 - cfg.b2**t)) + cfg.eps)
            want[k] -= 0.1 * (step + (0.5 * want[k] if k == "w" else 0.0))
        # float32: a few roundings of 6e-8.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, want)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e18])
def test_a_bounded_update_is_finite_whatever_the_gradient(name, size):
    cfg = OptimizerConfig(name=name, groups=("path=w lr=10",))
    assert bounded(cfg)
    specs = {"w": ParamSpec((128, 128), (None, None)), "b_up": ParamSpec((4,), (None,))}
    optimizer = make_optimizer(cfg, specs, 100)
    params = drawn(specs, 0)
    state = optimizer.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda a: size * a, drawn(specs, 1 + i))
        updates, state = optimizer.update(grads, state, params)
        assert all(np.isfinite(a).all() for a in jax.tree.leaves((updates, state)))


@pytest.mark.parametrize(
    "changes",
    [
        {"clip_norm": 0.0},  # the square of a gradient overflows
        {"eps": 1e-30},
        {"learning_rate": 1e20},
        {"groups": ("path=w lr=1e30",)},
        {"learning_rate": 20.0, "weight_decay": 0.1},  # parameters grow by their decay
        {"name": "muon"},  # with coefficients that diverge
    ],
)
def test_an_update_that_may_overflow_is_looked_at(changes):
    assert not bounded(OptimizerConfig(**changes))

"""The compiled products against NumPy, and how they are made."""

import dataclasses
import os
import pathlib
import stat
import subprocess
import sys
import tomllib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled  # noqa: F401
from tiny import OVERRIDES

from experiments import quickstart
from moejax import cpu_kernels
from moejax.config_io import from_config_dict
from moejax.cpu_kernels import build
from moejax.models import transformer
from moejax.models.loss import loss_fn
from moejax.weights import FORMATS, as_bits, dot, is_quantized, quantize

# Experts, inputs, outputs, rows of each, rows past them. Rows of one read the matrix where it lies; more take
# panels, of one block or of several. Sizes that fill neither vectors nor panels; several depths of a panel;
# matrices that few rows share out in pieces of inputs, and of outputs.
SHAPES = {
    "few and many": (4, 64, 48, (5, 0, 30, 1), 3),
    "odd outputs": (3, 96, 37, (1, 400, 14), 0),
    "deep": (2, 1120, 70, (13, 1), 2),
    "in pieces": (1, 2048, 160, (3,), 0),
    "wide": (1, 32, 9000, (2,), 0),
    "one input": (3, 1, 24, (2, 0, 20), 1),
    "no row": (2, 32, 16, (0, 0), 4),
}
KINDS = ("float32", "bfloat16", "bits", *FORMATS)


def matrices(kind, shape, rng):
    w = jnp.asarray(rng.normal(size=shape), jnp.float32)
    if kind in FORMATS:
        how = FORMATS[kind].of(shape[1])
        return how and quantize(w, how)
    return as_bits(w.astype(jnp.bfloat16)) if kind == "bits" else w.astype(kind)


def as64(a):
    return np.asarray(a.astype(jnp.float32), np.float64)


def close(got, dtype, equation, a, b, kind=""):
    """`got` is the sum of products that einsum's equation says.

    In float32 n roundings of partial sums, of either sign, are at most sqrt(n) eps / 2 of the sum of the
    products' sizes; n is up to 2048, and partial sums are mostly smaller: 8 eps. (int4 sums values from 0 to 15
    and takes 8 off in the end.) In bfloat16 the result is rounded (2^-9 of it), and before it the matrix: an
    error of 2^-9 in every product, of either sign, adds up to that of the root of the sum of their squares;
    five times that. Few rows that meet int4 are rounded to 2^-16 of the largest value of a block."""
    got = np.asarray(jnp.asarray(got).astype(jnp.float32), np.float64)
    want = np.einsum(equation, a, b)
    bound = np.einsum(equation, np.abs(a), np.abs(b)) * 8 * np.finfo(np.float32).eps
    if dtype == "bfloat16":
        squares = np.einsum(equation, a**2, b**2)
        bound = bound + (np.abs(want) + 5 * np.sqrt(squares)) * 2**-9
    if kind == "int4":
        squares = np.einsum(equation, np.full_like(a, np.max(a**2, initial=0)), b**2)
        bound = bound + 5 * np.sqrt(squares) * 2**-16
    worst = np.max(np.abs(got - want) / (bound + 1e-30), initial=0)
    assert worst <= 1, worst


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_products(compiled, shape, kind, dtype):  # noqa: F811
    """All three, of rows that are gathered, with matrices behind two others."""
    experts, inputs, outputs, sizes, past = SHAPES[shape]
    rng = np.random.default_rng(0)
    w = matrices(kind, (experts + 2, inputs, outputs), rng)
    if w is None:
        pytest.skip("no block divides one input")
    rows, expert_R = sum(sizes), np.repeat(np.arange(experts), sizes)
    tokens = max(rows // 2, 1)
    x, y = (jnp.asarray(rng.normal(size=(tokens, n)), dtype) for n in (inputs, outputs))
    at_R = rng.integers(0, tokens, rows + past).astype(np.int32)
    at_R[rows:] = 2**30  # never read
    sizes_E, x_R, y_R = jnp.asarray(sizes, jnp.int32), as64(x)[at_R[:rows]], as64(y)[at_R[:rows]]
    w_R = as64(w)[2 + expert_R]

    @jax.jit
    def run(x, y, w):
        both = cpu_kernels.grouped(x, at_R, sizes_E, 2, w, w)
        back = cpu_kernels.grouped_transposed(at_R, sizes_E, 2, (y, w), (y, w))
        return (*both, back, cpu_kernels.outer(x, at_R, y, at_R, sizes_E))

    first, second, back, outer = run(x, y, w)
    np.testing.assert_array_equal(first, second)
    assert first.dtype == back.dtype == dtype and outer.dtype == jnp.float32
    close(first[:rows], dtype, "ri,rio->ro", x_R, w_R, kind)
    close(back[:rows], dtype, "ro,rio->ri", 2 * y_R, w_R)
    mine_RE = np.eye(experts)[expert_R]
    close(outer, "float32", "rei,ro->eio", mine_RE[:, :, None] * x_R[:, None], y_R)
    assert not first[rows:].any() and not back[rows:].any()


def test_what_is_past_the_groups_is_not_read(compiled):  # noqa: F811
    """Rows, experts and matrices in front may hold anything."""
    x = jnp.ones((4, 8)).at[3].set(jnp.nan)
    w = jnp.ones((4, 8, 8)).at[jnp.array([0, 2])].set(jnp.nan)
    sizes, y = jnp.array([2, 0, 1]), jnp.full((4, 8), 2.0).at[3].set(jnp.nan)
    assert jnp.isfinite(cpu_kernels.grouped(x, None, sizes, 1, w)[0]).all()
    assert jnp.isfinite(cpu_kernels.grouped_transposed(None, sizes, 1, (y, w))).all()
    outer = cpu_kernels.outer(x, None, y, None, sizes)
    assert jnp.isfinite(outer).all() and not outer[1].any()


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_is_seen(compiled, kind, rows):  # noqa: F811
    """In its row, and in no other; and a row of very small values is one."""
    w = matrices(kind, (1, 64, 112), np.random.default_rng(1))[0]  # int4: in integers, and a rest
    x = jnp.ones((rows, 64)).at[0, 3].set(jnp.nan).at[1, 40].set(jnp.inf)
    y = cpu_kernels.dot(x, w)
    assert not jnp.isfinite(y[:2]).any() and jnp.isfinite(y[2:]).all()
    small = cpu_kernels.dot(jnp.full((rows, 64), 1e-38), w)
    assert jnp.isfinite(small).all() and float(jnp.abs(small).max()) < 1e-35


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_dot(compiled, kind, rows):  # noqa: F811
    """`weights.dot` takes it for rows in bfloat16 and for matrices in few bits. Its gradients are those of the
    product with the matrix written out; a matrix in few bits gets none."""
    rng = np.random.default_rng(1)
    w, dtype = matrices(kind, (1, 64, 40), rng)[0], "float32" if kind in FORMATS else "bfloat16"
    x, y = (jnp.asarray(rng.normal(size=(rows, n)), dtype) for n in (64, 40))
    whole = as64(w)
    assert "moejax_grouped" in str(jax.make_jaxpr(dot)(x, w))
    got, pull = jax.vjp(jax.jit(lambda x: dot(x, w)), x)
    close(got, dtype, "ti,io->to", as64(x), whole, kind)
    close(pull(y)[0], dtype, "to,io->ti", as64(y), whole)
    if not is_quantized(w):
        (dw,) = jax.vjp(lambda w: dot(x, w), w)[1](y)
        assert dw.dtype == w.dtype
        close(dw, str(w.dtype), "ti,to->io", as64(x), as64(y))


def test_under_vmap(compiled):  # noqa: F811
    rng = np.random.default_rng(2)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((3, 5, 16), (3, 16, 8)))
    got = jax.vmap(dot)(x, w)
    close(got, "bfloat16", "bti,bio->bto", as64(x), as64(w))


def test_what_stays_with_xla(compiled):  # noqa: F811
    """Plain float32, which XLA:CPU multiplies at the processor's peak, and float64 on either side."""
    assert "moejax_grouped" not in str(jax.make_jaxpr(dot)(jnp.ones((2, 8)), jnp.ones((8, 8))))
    with jax.enable_x64(True):
        w = quantize(jnp.ones((32, 8)), FORMATS["int8"])
        assert "moejax_grouped" not in str(jax.make_jaxpr(dot)(np.ones((2, 32)), w))
        x = jnp.ones((2, 32), jnp.bfloat16)
        assert "moejax_grouped" not in str(jax.make_jaxpr(dot)(x, np.ones((32, 8))))


@pytest.mark.parametrize("wrong", ["dtype", "inputs", "scale"])
def test_what_does_not_fit_is_refused(compiled, wrong):  # noqa: F811
    """By the call itself, should `serve` ever let it pass."""
    x, sizes = jnp.ones((4, 32)), jnp.array([4])
    w = jnp.ones((1, 32, 8), jnp.int16 if wrong == "dtype" else jnp.float32)
    if wrong == "inputs":
        w = w[:, 1:]
    if wrong == "scale":
        quantised = quantize(w, FORMATS["int4"])
        w = dataclasses.replace(quantised, scale=quantised.scale.astype(jnp.float32))
    with pytest.raises(Exception, match="moejax's CPU kernels"):
        jax.block_until_ready(cpu_kernels.grouped(x, None, sizes, 0, w))


def test_several_devices_do_without():
    assert jax.device_count() > 1 and not cpu_kernels.here()


# --------------------------------------------------------------------------------------------------
# Compiling.


def test_sources_are_part_of_the_package():
    root = pathlib.Path(build.__file__).parents[2]
    with open(root / "pyproject.toml", "rb") as f:
        patterns = tomllib.load(f)["tool"]["setuptools"]["package-data"]["moejax"]
    found = {p for pattern in patterns for p in (root / "moejax").glob(pattern)}
    sources = {p for p in build._SOURCE.parent.iterdir() if p.suffix in (".cc", ".h")}
    assert len(sources) == 4 and sources <= found


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`build.load` as if for the first time, with a cache of its own, and what it registers."""
    registered = []
    monkeypatch.setattr(build, "_register", lambda path: registered.append(path.read_text()))
    monkeypatch.setenv("MOEJAX_CACHE", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    return build.load.__wrapped__, registered


def compiler(path, body):
    path.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 1.0; exit; fi\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


WRITES = 'while [ "$1" != -o ]; do shift; done; echo made >> "$2"; echo made >> {}'


def test_it_is_compiled_once(fresh, monkeypatch, tmp_path, capsys):
    load, registered = fresh
    calls = tmp_path / "calls"
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", WRITES.format(calls)))
    assert load() and load()
    assert registered == ["made\n"] * 2 and calls.read_text() == "made\n"
    assert capsys.readouterr().err.count("compiling kernels") == 1
    (library,) = (tmp_path / "cache/moejax/cpu_kernels").iterdir()  # and nothing half written
    assert library.suffix == ".so"
    # Another compiler, or another source, is another library.
    monkeypatch.setenv("CXX", compiler(tmp_path / "other", WRITES.format(calls)))
    assert load() and calls.read_text() == "made\n" * 2


def test_a_library_that_cannot_be_loaded_is_made_again(fresh, monkeypatch, tmp_path):
    load, _ = fresh
    calls, failed = tmp_path / "calls", []

    def register(path):
        if not failed:
            failed.append(path)
            raise OSError("file too short")

    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", WRITES.format(calls)))
    assert load()
    monkeypatch.setattr(build, "_register", register)
    assert load() and failed and calls.read_text() == "made\n" * 2


def test_without_a_cache_it_is_made_for_this_process(fresh, monkeypatch, tmp_path):
    load, registered = fresh
    monkeypatch.setenv("MOEJAX_CACHE", "off")
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", WRITES.format(tmp_path / "calls")))
    assert load() and registered == ["made\n"] and not (tmp_path / "cache").exists()


def test_a_compiler_that_fails_is_named(fresh, monkeypatch, tmp_path):
    load, registered = fresh
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", "echo no room left >&2; exit 1"))
    with pytest.warns(UserWarning, match=r"cxx failed.*MOEJAX_CPU_KERNELS=off.*no room left"):
        assert not load()
    assert not registered and not list((tmp_path / "cache/moejax/cpu_kernels").iterdir())
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    with pytest.warns(UserWarning, match="absent failed"):
        assert not load()


def test_none_without_a_compiler_or_when_switched_off(fresh, monkeypatch, tmp_path):
    load, registered = fresh
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not load()
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", WRITES.format(tmp_path / "calls")))
    monkeypatch.setenv(build.SWITCH, "off")
    assert not load() and not registered


SUMS = """
import jax, jax.numpy as jnp, numpy as np, sys
from moejax import cpu_kernels
rng = np.random.default_rng(0)
x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((40, 1024), (2, 1024, 600)))
assert cpu_kernels.here()
for sizes in ((40, 0), (3, 37)):
    y = cpu_kernels.grouped(x, None, jnp.array(sizes), 0, w)[0]
    sys.stdout.buffer.write(np.asarray(y).tobytes())
"""


@pytest.mark.product
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no choice of cores")
def test_sums_do_not_depend_on_threads(tmp_path):
    """Bit for bit the same on one core as on all."""
    if build._compiler() is None:
        pytest.skip("no C++ compiler")
    unset = ("XLA_FLAGS", "MOEJAX_CACHE", build.SWITCH)
    env = {k: v for k, v in os.environ.items() if k not in unset}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    one_core = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}})\n"
    got = [
        subprocess.run(
            [sys.executable, "-c", first + SUMS], env=env, check=True, capture_output=True
        ).stdout
        for first in ("", one_core)
    ]
    assert got[0] and got[0] == got[1]


# --------------------------------------------------------------------------------------------------
# A whole model.


def test_a_training_step(compiled, monkeypatch):  # noqa: F811
    """Loss and every gradient of a small mixture, as without them: float32 sums in another order, through two
    layers."""
    small = quickstart.get_config()
    small.update_from_flattened_dict({**OVERRIDES, "model.vocab_size": 64})
    cfg = from_config_dict(small)
    params, state = transformer.init_model(cfg.model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 32), 0, 64)
    one = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(32), tokens.shape)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 1), "segment_ids": one}
    batch |= {"positions": positions, "loss_mask": one, "domain": one * 0}

    def run():
        def loss(params):
            options = {"objective": cfg.objective, "compute": cfg.compute}
            return loss_fn(params, state, batch, cfg.model, **options)[0]

        step = jax.jit(jax.value_and_grad(loss))
        return step.lower(params).as_text(), step(params)

    text, got = run()
    assert "moejax_outer" in text
    monkeypatch.setattr(cpu_kernels, "here", lambda: False)
    jax.clear_caches()
    text, want = run()
    assert "moejax" not in text
    chex.assert_trees_all_close(got, want, rtol=1e-4, atol=1e-6)

"""One suite over every implementation of the grouped matmul: value, dx and dw against the float64
oracle."""

import dataclasses
import functools
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import types

import hypothesis
import hypothesis.strategies as st
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from moejax.config import ComputeConfig
from moejax.moe.grouped_matmul import (
    IMPLEMENTATIONS,
    grouped_matmul,
    here,
    ragged,
    tokamax_kernels,
)
from moejax.options import choices_of

# tokamax is an optional extra for accelerators: see `test_tokamax_*` below.
RUNNABLE = ("reference", "ragged")
E, D, F = 5, 8, 12

GROUPS = {
    "uneven": (40, [3, 17, 9, 1, 10]),
    "empty groups": (40, [0, 25, 0, 15, 0]),
    "all in the last": (40, [0, 0, 0, 0, 40]),
    "all in the first": (40, [40, 0, 0, 0, 0]),
    "rows past the sum": (40, [5, 0, 11, 2, 3]),
    "all groups empty": (40, [0, 0, 0, 0, 0]),
    # Longer than the tiles of a kernel, and no multiples of them.
    "several tiles": (700, [300, 1, 0, 129, 265]),
}


def _inputs(rows, sizes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(rows, D)), rng.normal(size=(rows, F))
    w = rng.normal(size=(len(sizes), D, F))
    # Rounded to dtype first, so that the oracle sees the same numbers.
    x, w, dy = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, w, dy))
    return x, w, dy, np.asarray(sizes, np.int32)


def _oracle(x, w, dy, sizes):
    """float64 NumPy, one expert at a time: y, dx, dw."""
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, n in enumerate(sizes):
        rows = slice(start, start + n)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
        start += n
    return y, dx, dw


@functools.partial(jax.jit, static_argnames="implementation")
def _value_and_gradients(x, w, dy, sizes, implementation):
    y, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
    return y, *pull(dy)


def _tolerance(dtype, terms):
    """Sums of `terms` products of standard normals are about sqrt(terms) large, at most 4
    sqrt(terms). Rounding the result costs half an ulp of that, 2 eps sqrt(terms). Rounding the
    partial sums costs eps sqrt(k) at the k-th, at random: eps terms / sqrt(6) in all, so eps terms
    is more than two deviations of the order in which sums are taken; bfloat16 accumulates in
    float32."""
    accumulator = jnp.promote_types(dtype, jnp.float32)
    eps, eps_accumulator = float(jnp.finfo(dtype).eps), float(jnp.finfo(accumulator).eps)
    return 2 * eps * np.sqrt(terms) + 2 * eps_accumulator * terms


def _compare(got, want, dtype, sizes):
    for g, w, terms in zip(got, want, (D, F, max(int(max(sizes)), 1)), strict=True):
        assert g.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(g, np.float64), w, atol=_tolerance(dtype, terms), rtol=0
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", GROUPS)
@pytest.mark.parametrize("implementation", RUNNABLE)
def test_against_oracle(implementation, case, dtype):
    x, w, dy, sizes = _inputs(*GROUPS[case], dtype)
    arrays = [jnp.asarray(a, dtype) for a in (x, w, dy)]
    got = _value_and_gradients(*arrays, sizes, implementation)
    _compare(got, _oracle(x, w, dy, sizes), jnp.dtype(dtype), sizes)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_float64(implementation):
    x, w, dy, sizes = _inputs(*GROUPS["uneven"], "float32")
    with jax.enable_x64(True):
        got = _value_and_gradients(*map(jnp.asarray, (x, w, dy)), sizes, implementation)
        _compare(got, _oracle(x, w, dy, sizes), jnp.dtype("float64"), sizes)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_poisoned_padding(implementation):
    """NaN in the rows past the sum, in x and in the incoming gradient, reaches nothing."""
    x, w, dy, sizes = _inputs(*GROUPS["rows past the sum"], "float32")
    used = sizes.sum()
    want = _oracle(x, w, dy, sizes)
    x[used:] = dy[used:] = np.nan
    got = _value_and_gradients(
        *(jnp.asarray(a, jnp.float32) for a in (x, w, dy)), sizes, implementation
    )
    _compare(got, want, jnp.dtype("float32"), sizes)
    assert not np.any(np.asarray(got[0])[used:]) and not np.any(np.asarray(got[1])[used:])


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_zero_rows_and_one_group(implementation):
    for rows, sizes in ((0, [0, 0]), (6, [6])):
        x, w, dy, sizes = _inputs(rows, sizes, "float32")
        got = _value_and_gradients(
            *(jnp.asarray(a, jnp.float32) for a in (x, w, dy)), sizes, implementation
        )
        _compare(got, _oracle(x, w, dy, sizes), jnp.dtype("float32"), sizes)


# Few shapes, so few compiles; the groups within them are free.
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    rows=st.sampled_from([7, 150]),
    shares=st.lists(st.integers(0, 9), min_size=E, max_size=E),
    filled=st.floats(0, 1),
    seed=st.integers(0, 2**16),
)
def test_drawn_groups(rows, shares, filled, seed):
    total = max(sum(shares), 1)
    sizes = [int(filled * rows * s / total) for s in shares]
    x, w, dy, sizes = _inputs(rows, sizes, "float32", seed)
    got = _value_and_gradients(*(jnp.asarray(a, jnp.float32) for a in (x, w, dy)), sizes, "ragged")
    _compare(got, _oracle(x, w, dy, sizes), jnp.dtype("float32"), sizes)


def test_under_scan_and_remat():
    """Two layers by scan + remat give the gradients of the same two layers written out."""
    x, _, _, sizes = _inputs(*GROUPS["uneven"], "float32")
    w_LEDD = jnp.asarray(np.random.default_rng(1).normal(size=(2, E, D, D)), jnp.float32)
    x = jnp.asarray(x, jnp.float32)

    def layer(x, w, implementation):
        return jnp.tanh(grouped_matmul(x, w, sizes, implementation=implementation))

    def scanned(w_LEDD):
        step = jax.checkpoint(lambda x, w: (layer(x, w, "ragged"), None))
        return jnp.sum(jax.lax.scan(step, x, w_LEDD)[0])

    def written_out(w_LEDD):
        return jnp.sum(layer(layer(x, w_LEDD[0], "reference"), w_LEDD[1], "reference"))

    got, want = jax.jit(jax.grad(scanned))(w_LEDD), jax.jit(jax.grad(written_out))(w_LEDD)
    # Both in float32: sums of up to 17 terms of size about 3, through two layers.
    np.testing.assert_allclose(got, want, atol=3e-5, rtol=0)


@pytest.mark.parametrize("implementation", RUNNABLE)
def test_in_shard_map(implementation):
    """Rows split over one axis, experts' weights replicated over it: dw is the sum over devices.
    Types are checked (check_vma), so a loop carry or a gradient of the wrong type is an error."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x, w, dy, _ = _inputs(4 * 20, [0] * E, "float32")
    sizes_GE = np.array([[4, 4, 4, 4, 4], [0, 20, 0, 0, 0], [1, 2, 3, 0, 0], [0, 0, 0, 0, 19]])
    P = PartitionSpec

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data")
    )
    def sharded(x_RD, w_EDF, sizes_1E):
        return grouped_matmul(x_RD, w_EDF, sizes_1E[0], implementation=implementation)

    @jax.jit
    def run(x, w, dy, sizes):
        y, pull = jax.vjp(lambda x, w: sharded(x, w, sizes), x, w)
        return y, *pull(dy)

    got = run(*(jnp.asarray(a, jnp.float32) for a in (x, w, dy)), jnp.asarray(sizes_GE, jnp.int32))
    parts = [_oracle(x[20 * g :][:20], w, dy[20 * g :][:20], sizes_GE[g]) for g in range(4)]
    want = (*(np.concatenate([p[i] for p in parts]) for i in (0, 1)), sum(p[2] for p in parts))
    _compare(got, want, jnp.dtype("float32"), [32])


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("implementation", RUNNABLE)
def test_lowers_for_accelerators(implementation, platform):
    """A broken lowering for hardware that is not here fails here."""
    x = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((4, 128, 256), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def value_and_gradients(x, w, sizes):
        y, pull = jax.vjp(
            lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w
        )
        return y, *pull(y)

    exported = jax.export.export(jax.jit(value_and_gradients), platforms=[platform])(x, w, sizes)
    text = exported.mlir_module()
    assert ("ragged_dot" in text) == (implementation == "ragged")
    if implementation != "reference":  # its cumsum may be a loop
        assert "stablehlo.while" not in text


def test_the_config_lists_the_table():
    """'auto' is no implementation of the product: it chooses a path for the whole FFN."""
    assert choices_of(ComputeConfig, "grouped_matmul") == ("auto", *IMPLEMENTATIONS)


def test_tokamax_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    x, w, sizes = jnp.zeros((4, D)), jnp.zeros((E, D, F)), jnp.zeros(E, jnp.int32)
    with pytest.raises(ImportError, match=r"pip install 'moejax\[kernels\]'"):
        grouped_matmul(x, w, sizes, implementation="tokamax")


@dataclasses.dataclass
class Tokamax:
    """A stand-in with the interface of tokamax and what was seen of it on a GPU: Mosaic refuses 32 bits; rows
    past the sum and groups without rows may hold anything."""

    triton: bool = True
    used: list[str] = dataclasses.field(default_factory=list)

    def ragged_dot_general(
        self, lhs, rhs, group_sizes, dimensions, *, preferred_element_type, implementation
    ):
        sizes, rows = group_sizes
        assert rows == lhs.shape[0]
        kernel = implementation if isinstance(implementation, str) else implementation[0]
        if kernel == "triton" and not self.triton:
            raise ValueError("Unknown implementation: triton")
        if kernel == "mosaic" and lhs.dtype == jnp.float32:
            raise NotImplementedError("16 bits only")
        # A tuned shape is looked up by all that it is called with, and forward products were tuned with None.
        forward = dimensions is ragged.CONTRACT_D
        assert preferred_element_type == (None if forward else lhs.dtype)
        self.used.append(kernel)
        out = jax.lax.ragged_dot_general(
            lhs, rhs, sizes, dimensions, preferred_element_type=preferred_element_type or lhs.dtype
        )
        if out.ndim == 2:
            return jnp.where(jnp.arange(rows)[:, None] >= sizes.sum(), jnp.nan, out)
        return jnp.where(sizes[:, None, None] == 0, jnp.nan, out)


def _tokamax(monkeypatch, backend="gpu", **how):
    fake, module = Tokamax(**how), types.ModuleType("tokamax")
    module.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    module.ragged_dot_general = fake.ragged_dot_general  # type: ignore[attr-defined]
    module.RaggedDotGroupSizes = lambda sizes, rows: (sizes, rows)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokamax", module)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    jax.clear_caches()  # a program traced for another device
    return fake


@pytest.mark.parametrize(
    ("dtype", "width", "rows", "kernels"),
    [
        ("bfloat16", 64, 40, ["mosaic", "mosaic", "triton"]),
        ("bfloat16", 64, 41, ["triton"] * 3),
        ("bfloat16", 8, 40, ["triton"] * 3),
        ("float32", 64, 40, ["triton"] * 3),
    ],
)
def test_tokamax_kernels(dtype, width, rows, kernels, monkeypatch):
    """Value, dx and dW each by its kernel; nothing undefined gets out."""
    fake = _tokamax(monkeypatch)
    sizes = np.asarray([0, 20, 0, 11, 2], np.int32)
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(2, rows, width))
    w = rng.normal(size=(5, width, width))
    x, w, dy = (np.asarray(jnp.asarray(a, dtype), np.float64) for a in (x, w, dy))
    got = _value_and_gradients(*(jnp.asarray(a, dtype) for a in (x, w, dy)), sizes, "tokamax")
    assert fake.used == kernels
    dtype = jnp.dtype(dtype)
    for g, want in zip(got, _oracle(x, w, dy, sizes), strict=True):
        np.testing.assert_allclose(
            np.asarray(g, np.float64), want, atol=_tolerance(dtype, width), rtol=0
        )


def test_tokamax_without_triton(monkeypatch):
    fake = _tokamax(monkeypatch, triton=False)
    x = jnp.zeros((40, 64), jnp.bfloat16)
    args = x, jnp.zeros((5, 64, 64), jnp.bfloat16), x, jnp.asarray([40, 0, 0, 0, 0])
    with pytest.warns(UserWarning, match="no Triton kernels here.*pip install jax-triton"):
        _value_and_gradients(*args, "tokamax")
    assert fake.used == ["mosaic"] * 3


@pytest.mark.parametrize("capability", ["9.0", "8.0"])
def test_hopper_has_tiles_of_its_own(capability, monkeypatch):
    """A kernel with HOPPER_TILES; elsewhere, and with a tokamax that does not take them, tokamax's own."""
    config = dataclasses.make_dataclass("Config", list(tokamax_kernels.HOPPER_TILES))
    kernel = types.SimpleNamespace(replace=lambda config: config)
    api = types.SimpleNamespace(IMPLEMENTATIONS={"mosaic_gpu": kernel})
    common = types.SimpleNamespace(Config=config)
    inside = types.ModuleType("tokamax._src.ops.ragged_dot")
    inside.api, inside.pallas_mosaic_gpu_common = api, common  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, inside.__name__, inside)
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    chosen = tokamax_kernels._hopper_mosaic.__wrapped__
    assert chosen() == (config(**tokamax_kernels.HOPPER_TILES) if capability == "9.0" else "mosaic")
    del common.Config
    if capability == "9.0":
        with pytest.warns(UserWarning, match=r"tokamax 9\.9 does not take tiles"):
            assert chosen() == "mosaic"


def test_tokamax_on_a_tpu(monkeypatch):
    fake = _tokamax(monkeypatch, "tpu")
    x, w, dy, sizes = _inputs(*GROUPS["uneven"], "bfloat16")
    _value_and_gradients(*(jnp.asarray(a, jnp.bfloat16) for a in (x, w, dy)), sizes, "tokamax")
    assert fake.used == ["mosaic"] * 3


def test_what_auto_takes(monkeypatch):
    """An accelerator's own kernels, or a warning that every row meets every expert."""
    assert here() == "ragged"  # tests run on CPUs
    _tokamax(monkeypatch)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert here() == "tokamax"
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    with pytest.warns(UserWarning, match="every row by every expert.*one device only"):
        assert here() == "ragged"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(
        UserWarning, match=r"every row by every expert.*pip install 'moejax\[kernels\]'"
    ):
        assert here() == "ragged"


def test_bad_input():
    x, w, sizes = jnp.zeros((4, D)), jnp.zeros((E, D, F)), jnp.zeros(E, jnp.int32)
    with pytest.raises(ValueError, match=r"'raged'.*ragged"):
        grouped_matmul(x, w, sizes, implementation="raged")
    with pytest.raises(ValueError, match=r"\(5, 7\)"):
        grouped_matmul(x[:, :7], w, sizes)
    with pytest.raises(ValueError, match="cast one"):
        grouped_matmul(x.astype(jnp.bfloat16), w, sizes)
    with pytest.raises(ValueError, match="integers"):
        grouped_matmul(x, w, sizes.astype(jnp.float32))
    with pytest.raises(TypeError):
        IMPLEMENTATIONS["mine"] = grouped_matmul  # type: ignore[index]

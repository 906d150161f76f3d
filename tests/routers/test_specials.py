"""Special experts (2410.07348 section 3.1): numbers worked by hand, and routes apart from those of experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.params import init_params
from moejax.routers import specials
from moejax.routers.contract import Routing

KINDS = ("zero", "copy", "constant")
# With x = (1, 2) the logits are 0 and ln 3, so a = (1/4, 3/4); with x = (3, 0) they are equal.
X_TD = np.array([[1.0, 2.0], [3.0, 0.0]], np.float32)
CONSTANT = {
    "w": np.array([[0.0, 0.0], [0.0, np.log(3.0) / 2]], np.float32),
    "v": np.array([10.0, 20.0], np.float32),
}
OUTPUT = {
    "zero": [[0.0, 0.0], [0.0, 0.0]],
    "copy": [[1.0, 2.0], [3.0, 0.0]],
    # 1/4 (1, 2) + 3/4 (10, 20); 1/2 (3, 0) + 1/2 (10, 20).
    "constant": [[7.75, 15.5], [6.5, 10.0]],
}


def test_every_kind_is_worked_by_hand():
    assert set(OUTPUT) == set(specials.SPECIALS)


@pytest.mark.parametrize("kind", OUTPUT)
def test_output(kind):
    got = specials.SPECIALS[kind].apply(CONSTANT, jnp.asarray(X_TD))
    np.testing.assert_allclose(got, OUTPUT[kind], rtol=1e-6)  # a softmax in float32
    half = specials.SPECIALS[kind].apply(CONSTANT, jnp.asarray(X_TD, jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    # 8 bits of w, of a and of each product: four roundings of 2^-9 of values up to 15.
    np.testing.assert_allclose(np.float32(half), OUTPUT[kind], rtol=0.01)


def test_parameters_are_of_the_kinds_that_have_any():
    """Numbered among the special experts, two of a kind apart."""
    specs = specials.param_specs(("zero", "constant", "copy", "constant"), 2, 0.5)
    assert {i: {n: s.shape for n, s in group.items()} for i, group in specs.items()} == {
        "1": {"w": (2, 2), "v": (2,)},
        "3": {"w": (2, 2), "v": (2,)},
    }
    values = init_params(specs, jax.random.key(0))
    assert (values["1"]["v"] != values["3"]["v"]).all()
    assert specials.param_specs(("zero", "copy"), 2, 0.5) == {}


def test_weighted_sum():
    """The first token takes half of copy and a quarter of constant; the second nothing but zero."""
    weights_TN = jnp.array([[0.0, 0.5, 0.25], [0.7, 0.0, 0.0]])
    got = specials.combine({"2": CONSTANT}, jnp.asarray(X_TD), weights_TN, KINDS)
    np.testing.assert_allclose(got, [[2.4375, 4.875], [0.0, 0.0]], rtol=1e-6)
    half = specials.combine({"2": CONSTANT}, jnp.asarray(X_TD, jnp.bfloat16), weights_TN, KINDS)
    assert half.dtype == jnp.bfloat16


def test_split_tells_experts_from_special_ones():
    """Of 2 experts, so 2 is zero, 3 is copy and 4 is constant."""
    index_TK = jnp.array([[0, 2], [3, -1], [4, 1], [3, 4]], jnp.int32)
    weights_TK = jnp.array([[0.1, 0.2], [0.3, 0.0], [0.5, 0.6], [0.7, 0.8]])
    routing, special_TN, stray = specials.split(Routing(index_TK, weights_TK), 2, KINDS)
    np.testing.assert_array_equal(routing.expert_index_TK, [[0, -1], [-1, -1], [-1, 1], [-1, -1]])
    want = np.array([[0.1, 0], [0, 0], [0, 0.6], [0, 0]], np.float32)
    np.testing.assert_array_equal(routing.combine_weights_TK, want)
    want = np.array([[0.2, 0, 0], [0, 0.3, 0], [0, 0, 0.5], [0, 0.7, 0.8]], np.float32)
    np.testing.assert_array_equal(special_TN, want)
    assert stray == 0


@pytest.mark.parametrize(("bad", "kinds"), [(5, KINDS), (2, ()), (-2, KINDS)])
def test_a_stray_index_raises_eagerly_and_is_counted_under_jit(bad, kinds):
    """It goes to nobody: neither to an expert nor to a special one."""
    index_TK = jnp.array([[0, bad], [1, bad]], jnp.int32)
    routing = Routing(index_TK, jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=rf"expert {bad}; there are 0 to {1 + len(kinds)}"):
        specials.split(routing, 2, kinds)
    got, special_TN, stray = jax.jit(lambda r: specials.split(r, 2, kinds))(routing)
    np.testing.assert_array_equal(got.expert_index_TK, [[0, -1], [1, -1]])
    np.testing.assert_array_equal(got.combine_weights_TK, [[1, 0], [1, 0]])
    assert stray == 2 and special_TN.shape == (2, len(kinds)) and not special_TN.any()

"""The linear map that every layer uses."""

import jax

from moejax.weights import Weight, dot


def linear(x: jax.Array, w_DF: Weight, b_F: jax.Array | None = None) -> jax.Array:
    """x (..., D) @ w (D, F) + b, computed in x's dtype: (..., F).

    The leading dimensions are merged first. With more than one of them, the gradient of w contracts
    several dimensions at once, which XLA:CPU does by writing transposed copies of both operands; with one
    it is a plain product.
    """
    y = dot(x.reshape(-1, x.shape[-1]), w_DF)
    if b_F is not None:
        y = y + b_F.astype(x.dtype)[None]
    return y.reshape(*x.shape[:-1], w_DF.shape[1])

"""Reading a prompt and decoding on a mesh give the logits of one device, for any number of rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mesh_case import CFG, MODEL, QUICK, TOLERANCE, config, layout_of, make_inputs

from moejax.models import transformer
from moejax.models.cache import init_cache


@functools.partial(jax.jit, static_argnames=("layout", "prefill"), compiler_options=QUICK)
def step(params, router_state, tokens_BS, positions_BS, cache, layout, prefill):
    out = transformer.forward(
        params,
        router_state,
        tokens_BS,
        MODEL,
        compute=CFG.compute,
        positions_BS=positions_BS,
        cache=cache,
        prefill=prefill,
        layout=layout,
    )
    return transformer.logits(params, out.hidden_BSD), out.cache


def logits(rows: int, layout):
    """Of four tokens read at once and a fifth decoded."""
    with jax.enable_x64(True):
        params, state, batch = make_inputs(CFG, skewed=False)
        if layout is not None:
            params = jax.device_put(params, layout.of_specs(transformer.param_specs(MODEL)))
        tokens = batch["tokens"][4 : 4 + rows]
        positions = jnp.broadcast_to(jnp.arange(4)[None], tokens.shape)
        cache = init_cache(MODEL, rows, 8, dtype=CFG.compute.dtype)
        first, cache = step(params, state, tokens, positions, cache, layout, True)
        last = jnp.full((rows, 1), 4), tokens[:, :1]
        second, _ = step(params, state, last[1], last[0], cache, layout, False)
        return np.concatenate([first, second], axis=1)


@pytest.mark.parametrize("rows", [4, 3])
def test_logits_of_one_device(rows):
    """4 rows are split over data and expert; 3 stay whole, and only their tokens are split."""
    layout = layout_of(config(mesh=dict(data=2, expert=2, tensor=2)))
    want = logits(rows, None)
    assert np.isfinite(want).all() and want.std() > 0.1
    np.testing.assert_allclose(
        logits(rows, layout), want, rtol=TOLERANCE["rtol"], atol=TOLERANCE["atol"]
    )

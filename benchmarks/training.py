"""A training step that can be called again and again."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ExperimentConfig
from moejax.train.state import create_state
from moejax.train.step import compile_step


def moejax_step(cfg: ExperimentConfig, tokens: np.ndarray):
    """A function that takes one step on these tokens [B,S+1], a document in each row, and returns its loss."""
    ones = np.ones_like(tokens[:, 1:])
    positions = np.broadcast_to(np.arange(ones.shape[1], dtype=np.int32), ones.shape)
    batch = dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=ones,
        positions=positions,
        loss_mask=ones,
        domain=np.zeros_like(ones),
    )
    batch = jax.tree.map(jnp.asarray, batch)
    state = create_state(cfg, jax.random.key(0), None)
    step = compile_step(cfg)

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return run

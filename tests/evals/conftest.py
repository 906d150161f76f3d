"""A run that really trained, once for all tests of what comes after training."""

import pathlib

import jax
import pytest

from moejax.config import (
    AttentionConfig,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    TrainConfig,
)
from moejax.routers import router_options
from moejax.train.loop import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> pathlib.Path:
    """The folder of a byte-level run on two domains that share no character, 20 steps."""
    folder = tmp_path_factory.mktemp("trained")
    for name, alphabet in (("lower", "abcdefgh"), ("digits", "01234567")):
        lines = [" ".join(alphabet[(i * j) % 8] for j in range(40)) + "\n" for i in range(200)]
        (folder / f"{name}.txt").write_text("".join(lines))
    model = ModelConfig(
        d_model=16,
        num_layers=3,
        num_dense_layers=1,
        d_ff=32,
        init_std=0.1,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
        moe=MoEConfig(
            num_experts=8,
            experts_per_token=2,
            d_expert=8,
            shared_experts=1,
            router=router_options(score="sigmoid", normalize_weights=True, expert_bias=True),
        ),
    )
    data = DataConfig(
        sources=tuple(f"{n}={folder / n}.txt" for n in ("lower", "digits")),
        tokenizer="byte",
        seq_len=32,
        batch_size=4,
        validation_fraction=0.1,
    )
    times = TrainConfig(steps=20, log_every=2, eval_every=10, eval_batches=2, checkpoint_every=10)
    cfg = ExperimentConfig(
        name="tiny",
        model=model,
        objective=ObjectiveConfig(bias_update="sign"),
        data=data,
        train=times,
        mesh=MeshConfig(data=1),
    )
    train(cfg, folder / "run")
    return folder / "run"


@pytest.fixture
def parameters_are_arguments():
    """A program that holds a matrix of the model as a constant gives a warning, which is an error here.

    Such a program is as large as the model, compiles for as long, and belongs to one checkpoint. The model of
    `trained` has 16 kB in its embedding alone.
    """
    before = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 3000)
    yield
    jax.config.update("jax_captured_constants_warn_bytes", before)

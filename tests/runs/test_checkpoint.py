"""Checkpoints: what is saved comes back, on any mesh; what does not fit or is damaged is named."""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from moejax.routers import router_options
from moejax.runs.checkpoint import Checkpoints, abstract_model
from moejax.runs.checksums import checksum
from moejax.sharding import make_layout
from moejax.train.state import (
    abstract_state,
    create_state,
    restore_state,
    save_state,
    state_shardings,
)

CFG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=32,
        d_model=16,
        num_layers=2,
        d_ff=32,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
        moe=MoEConfig(
            num_experts=4, d_expert=8, router=router_options(score="sigmoid", expert_bias=True)
        ),
    ),
    objective=ObjectiveConfig(bias_update="sign"),
    data=DataConfig(seq_len=8, batch_size=8, tokenizer="byte"),
    optimizer=OptimizerConfig(warmup_steps=1),
    train=TrainConfig(keep_last=2, keep_every=4),
)


@pytest.fixture(scope="module")
def state():
    return create_state(CFG, jax.random.key(0), None)


def saved(workdir, state, steps=(1,)):
    checkpoints = Checkpoints(workdir, CFG)
    for step in steps:
        save_state(checkpoints, state._replace(step=jnp.int32(step)), {"next_index": step})
    checkpoints.close()
    return workdir


def on_mesh(**sizes: int):
    return make_layout(
        dataclasses.replace(CFG, mesh=dataclasses.replace(MeshConfig(data=1), **sizes))
    )


def same(a, b):
    chex.assert_trees_all_equal(a, b)


def damage(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def test_any_mesh_to_any_mesh(tmp_path, state):
    sharded = create_state(CFG, jax.random.key(0), on_mesh(data=2, expert=2, tensor=2))
    first = jax.device_get(sharded)
    # Initial values do not depend on the mesh, but for a last bit of the normal distribution's inverse.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), first, state)
    saved(tmp_path, sharded)
    for layout in (None, on_mesh(fsdp=8)):
        checkpoints = Checkpoints(tmp_path, CFG)
        restored, data_state = restore_state(checkpoints, layout)  # pyright: ignore
        checkpoints.close()
        assert data_state == {"next_index": 1}
        assert int(restored.step) == 1
        same(restored._replace(step=0), first._replace(step=0))
        w = restored.params["moe_blocks"]["moe"]["experts"]["w_up"]
        mu = restored.opt_state[1][0].mu["moe_blocks"]["moe"]["experts"]["w_up"]
        shards = 1 if layout is None else 8
        for a in (w, mu):
            assert len(a.sharding.device_set) == shards
            assert a.addressable_shards[0].data.size == a.size // shards


def test_saving_goes_on_in_the_background(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, CFG)
    save_state(checkpoints, state._replace(step=jnp.int32(1)), {})
    assert checkpoints.manager.is_saving_in_progress()
    checkpoints.wait()
    assert not checkpoints.manager.is_saving_in_progress()
    checkpoints.close()


def test_the_last_and_every_nth_are_kept(tmp_path, state):
    saved(tmp_path, state, steps=range(1, 8))
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {4, 6, 7}


def test_a_damaged_checkpoint_is_passed_over_and_its_step_can_be_saved_again(tmp_path, state):
    saved(tmp_path, state, steps=(1, 2))
    damage(tmp_path / "checkpoints" / "2")
    checkpoints = Checkpoints(tmp_path, CFG)
    with pytest.warns(UserWarning, match=r"checkpoints/2 cannot be read .*falling back to step 1"):
        restored = restore_state(checkpoints)
    assert restored is not None and restored[1] == {"next_index": 1}
    assert (tmp_path / "damaged" / "2").is_dir()
    again = state._replace(step=jnp.int32(2), skipped=jnp.int32(5))
    save_state(checkpoints, again, {"next_index": 2})
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, CFG)
    same(restore_state(checkpoints)[0], again)  # pyright: ignore
    checkpoints.close()


def restore_apart(folders):
    """What `restore_state` gives for each folder, in a process of its own: of damaged files orbax leaves
    readers behind, which die loudly at any later time. (position in the data, checksum of the parameters,
    warnings)."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, folders)],
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def restore_and_print(folder):
    checkpoints = Checkpoints(pathlib.Path(folder), CFG)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        state, position = restore_state(checkpoints)  # pyright: ignore
    checkpoints.close()
    texts = [str(w.message) for w in caught]
    print(json.dumps([position["next_index"], checksum(state.params), texts]))


def arrays_of(item):
    return sorted(f for f in item.rglob("*") if f.parent.name == "d")


def test_damaged_arrays_are_noticed(tmp_path, state):
    whole = saved(tmp_path / "whole", state, steps=(1, 2))
    folders = []

    def copy():
        folders.append(tmp_path / str(len(folders)))
        shutil.copytree(whole, folders[-1])
        return folders[-1] / "checkpoints" / "2"

    def cut(file):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    for item in ("model", "training"):
        for damage_one in (cut, pathlib.Path.unlink):
            for file in arrays_of(copy() / item):
                damage_one(file)
        # Readable, but not what was saved.
        path = copy() / "meta" / "metadata"
        meta = json.loads(path.read_text())
        meta["checksums"][item] ^= 1
        path.write_text(json.dumps(meta))
    noticed = len(folders)
    for number in range(len(arrays_of(whole / "checkpoints" / "2" / "model"))):
        cut(arrays_of(copy() / "model")[number])
    results = restore_apart(folders)
    for position, total, texts in results:
        assert total == checksum(state.params)
        fell_back = any("/2 cannot be read" in t and "falling back to step 1" in t for t in texts)
        assert position == (1 if fell_back else 2), texts
    assert all(position == 1 for position, *_ in results[:noticed])
    # Some files are superseded by others and not read; an index and what it points to are.
    assert sum(position == 1 for position, *_ in results[noticed:]) >= 2


def test_a_checksum_counts_every_word_once():
    a = jnp.arange(1, 7, dtype=jnp.int32).reshape(2, 3)
    assert checksum({"a": a}) == 21
    assert checksum([a, jnp.full((2,), 2**31 - 1, jnp.int32)]) == (21 + 2**32 - 2) % 2**32
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):  # as the float32 that they are
        assert checksum(jnp.ones((), dtype)) == 0x3F800000
    spread = jax.device_put(jnp.arange(8.0), on_mesh(data=2, fsdp=4).sharding("embed"))
    assert checksum(spread) == checksum(jnp.arange(8.0))


def test_nothing_left_to_read_is_an_error(tmp_path, state):
    saved(tmp_path, state)
    damage(tmp_path / "checkpoints" / "1")
    checkpoints = Checkpoints(tmp_path, CFG)
    with (
        pytest.warns(UserWarning, match="none is left"),
        pytest.raises(ConfigError, match=r"no checkpoint in .* can be read"),
    ):
        restore_state(checkpoints)
    checkpoints.close()


def test_an_imported_model_keeps_its_dtype_and_trains_from_float32(tmp_path, state):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state.params)
    bias = {"moe_blocks": {"expert_bias": jnp.arange(4, dtype=jnp.float32)[None]}}
    checkpoints = Checkpoints(tmp_path, CFG)
    checkpoints.save_model(half, bias)
    step, params, router_state = checkpoints.restore_model()  # pyright: ignore
    assert step == 0
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    same((params, router_state), (half, bias))
    fresh, data_state = restore_state(checkpoints, on_mesh(fsdp=8))  # pyright: ignore
    checkpoints.close()
    assert data_state is None and int(fresh.step) == 0
    assert {a.dtype for a in jax.tree.leaves(fresh.params)} == {jnp.dtype("float32")}
    same(fresh.params, jax.tree.map(lambda a: a.astype(jnp.float32), half))
    same(fresh.router_state, bias)
    same(fresh.opt_state, state.opt_state)


def test_another_model_is_named(tmp_path, state):
    saved(tmp_path, state)
    wider = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, vocab_size=64))
    checkpoints = Checkpoints(tmp_path, wider)
    with pytest.raises(ConfigError, match=r"(?s)params/embed.*\(32, 16\) there, \(64, 16\) now"):
        restore_state(checkpoints)
    checkpoints.close()


@pytest.mark.parametrize("sizes", [{}, {"data": 2, "expert": 2, "tensor": 2}, {"fsdp": 8}])
def test_a_model_is_read_to_where_training_has_it(sizes):
    """The shapes, dtypes and shardings of a model alone are those of the model in a state of training."""
    layout = on_mesh(**sizes) if sizes else None
    model = abstract_model(CFG.model, layout)
    state, shardings = abstract_state(CFG), state_shardings(CFG, layout)
    for name, items in model.items():
        same_tree = jax.tree.map(
            lambda a, b, s: (a.shape, a.dtype, a.sharding) == (b.shape, b.dtype, s),
            items,
            getattr(state, name),
            getattr(shardings, name),
        )
        assert all(jax.tree.leaves(same_tree))


if __name__ == "__main__":
    for each in sys.argv[1:]:
        restore_and_print(each)

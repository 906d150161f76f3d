"""Checkpoints: what is saved comes back, on any mesh; what does not fit or is damaged is named."""

import dataclasses
import errno
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
from moejax.runs import arrays, lock, restore
from moejax.runs.arrays import abstract_model
from moejax.runs.checkpoint import Checkpoints
from moejax.runs.checksums import checksums
from moejax.runs.restore import model_at, newest_model, seal
from moejax.sharding import make_layout
from moejax.train.state import (
    abstract_state,
    create_state,
    restore_state,
    save_state,
    state_of_model,
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


@pytest.mark.product
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
    readers behind, which die loudly at any later time. (position in the data, checksums of the parameters,
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
    index = position["next_index"]  # pyright: ignore
    print(json.dumps([index, checksums(state.params), texts]))


def files_of(step):
    return sorted(f for f in step.rglob("*") if f.is_file())


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def not_json(file):
    file.write_bytes(b"{" + file.read_bytes())


def other_json(file):
    file.write_bytes(b'{"a": [1]}')


@pytest.mark.product
def test_damage_of_any_file_is_noticed_or_harmless(tmp_path, state):
    """Every file of a checkpoint, orbax's own among them, cut, gone, or JSON of another kind."""
    whole = saved(tmp_path / "whole", state, steps=(1, 2))
    names = [f.relative_to(whole) for f in files_of(whole / "checkpoints" / "2")]
    folders = []
    for name in names:
        for damage_one in (cut, pathlib.Path.unlink, not_json, other_json):
            folders.append(tmp_path / str(len(folders)))
            shutil.copytree(whole, folders[-1])
            damage_one(folders[-1] / name)
    results = restore_apart(folders)
    right = checksums(state.params)
    for position, sums, texts in results:
        assert sums == right
        fell_back = any("/2 cannot be read" in t and "falling back to step 1" in t for t in texts)
        assert position == (1 if fell_back else 2), texts
    # Files that others supersede are not read, and how many there are differs from save to save. These are:
    fell_back = [position == 1 for position, *_ in results]
    at = names.index(pathlib.Path("checkpoints/2/meta/metadata"))
    assert all(fell_back[4 * at : 4 * at + 4])
    for name in (
        "model/_METADATA",
        "training/_METADATA",
    ):  # without it, but not with another, orbax can do
        at = names.index(pathlib.Path("checkpoints/2") / name)
        assert [fell_back[4 * at + i] for i in (0, 2, 3)] == [True] * 3, name
    for item in ("model", "training"):  # and of both, files with the arrays
        of_data = [i for i, n in enumerate(names) if n.parts[2] == item and n.parts[-2] == "d"]
        assert any(all(fell_back[4 * i : 4 * i + 4]) for i in of_data), item
    assert sum(fell_back) >= 4 * 5


def change_meta(workdir, change, *, sealed):
    path = workdir / "checkpoints" / "2" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    change(meta)
    if sealed:
        meta["sha256"] = seal(meta)
    path.write_text(json.dumps(meta))


@pytest.mark.parametrize(
    ("change", "sealed", "text"),
    [
        (lambda m: m["data"].update(next_index=3), False, "checksum of its meta"),
        (lambda m: m["config"]["train"].update(steps=3), False, "checksum of its meta"),
        (lambda m: m.pop("sha256"), False, "checksum of its meta"),
        (lambda m: m.pop("checksums"), True, "incomplete"),
        (
            lambda m: m["checksums"]["model"]["params/head"].update(sum=1),
            True,
            "checksum of params/head differs",
        ),
        (lambda m: m["checksums"]["training"]["skipped"].update(sum=1), True, "of skipped differs"),
    ],
)
def test_what_was_not_saved_is_named(tmp_path, state, change, sealed, text):
    saved(tmp_path, state, steps=(1, 2))
    change_meta(tmp_path, change, sealed=sealed)
    checkpoints = Checkpoints(tmp_path, CFG)
    with pytest.warns(UserWarning, match=rf"checkpoints/2 cannot be read .*{text}"):
        assert restore_state(checkpoints)[1] == {"next_index": 1}  # pyright: ignore
    checkpoints.close()


def test_a_config_that_is_not_the_checkpoint_s_is_refused(tmp_path, state):
    saved(tmp_path, state)
    other = dataclasses.replace(CFG, data=dataclasses.replace(CFG.data, seed=5))
    for read in (
        lambda: newest_model(tmp_path, other),
        lambda: restore_state(Checkpoints(tmp_path, other)),
    ):
        with pytest.raises(ConfigError, match=r"checkpoints/1 .*\n  - data.seed: 0 there, 5 now"):
            read()


def test_an_error_of_the_system_moves_nothing(tmp_path, state, monkeypatch):
    """EIO: once, the checkpoint is read all the same; for ever, that is said and nothing is moved."""
    saved(tmp_path, state, steps=(1, 2))
    monkeypatch.setattr(restore, "PAUSES_OF_THE_SYSTEM", (0.0, 0.0))
    read, failures = restore._read, [1]

    def fail(path, shapes):
        if failures and failures.pop():
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path, shapes)

    monkeypatch.setattr(restore, "_read", fail)
    checkpoints = Checkpoints(tmp_path, CFG)
    assert restore_state(checkpoints)[1] == {"next_index": 2}  # pyright: ignore
    failures[:] = [1] * 99
    with pytest.raises(
        ConfigError, match=r"(?s)/2 cannot be read: .*Input/output error.*nothing was moved"
    ):
        restore_state(checkpoints)
    checkpoints.close()
    assert not (tmp_path / "damaged").exists()
    assert (tmp_path / "checkpoints" / "2").exists()
    # As a file gives it: reading a process's memory at 0 is an I/O error.
    monkeypatch.setattr(restore, "_read", read)
    meta = tmp_path / "checkpoints/2/meta/metadata"
    meta.unlink()
    meta.symlink_to("/proc/self/mem")
    with pytest.raises(ConfigError, match="Input/output error"):
        newest_model(tmp_path, CFG)
    # And as tensorstore puts it in words.
    assert restore.passing(ValueError("UNAVAILABLE: .. [OS error 116: ESTALE Stale file handle]"))
    assert not restore.passing(
        ValueError("NOT_FOUND: [OS error 2: ENOENT No such file or directory]")
    )


def test_a_mistake_in_moejax_is_no_damage(tmp_path, state, monkeypatch):
    saved(tmp_path, state, steps=(1, 2))
    monkeypatch.setattr(restore, "fit", lambda *_: arrays.stored(None, None))  # pyright: ignore
    with pytest.raises(TypeError):
        newest_model(tmp_path, CFG)
    monkeypatch.setattr(restore, "_read", lambda *_: bytearray(1 << 62))
    monkeypatch.setattr(restore, "fit", lambda *_: {})
    with pytest.raises(MemoryError):
        newest_model(tmp_path, CFG)


def test_a_reader_beside_a_writer_looks_again(tmp_path, state, monkeypatch):
    """The writer deletes the step that is being read, having saved another."""
    saved(tmp_path, state, steps=(1,))
    read = restore._read

    def writer_goes_on(path, shapes):
        if path.parent.name == "1":
            saved(tmp_path, state, steps=(2,))
            shutil.rmtree(path.parent)
        return read(path, shapes)

    monkeypatch.setattr(restore, "_read", writer_goes_on)
    assert newest_model(tmp_path, CFG)[0] == 2  # pyright: ignore
    # If nothing can be read while a run goes on, nobody is told to leave its folder.
    damage(tmp_path / "checkpoints" / "2")
    with (
        lock.writing(tmp_path),
        pytest.warns(UserWarning, match="none is left"),
        pytest.raises(ConfigError, match=rf"process {os.getpid()} on .*: try again in a minute"),
    ):
        newest_model(tmp_path, CFG)


def test_bad_steps_do_not_push_out_the_last_good_one(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, CFG)  # which keeps two, and every fourth
    for step, bad in enumerate([0, 0, 1, 2, 3, 4], start=1):
        at = state._replace(step=jnp.int32(step), bad_in_a_row=jnp.int32(bad))
        save_state(checkpoints, at, {"next_index": step})
    checkpoints.wait()
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {1, 4, 6}  # the parameters of step 2 gave the bad steps
    assert checkpoints.forsake(2) == 1 and (tmp_path / "damaged" / "6").exists()
    for step, bad in ((2, 0), (3, 1), (5, 0)):  # a streak that ends was the batch's fault
        at = state._replace(step=jnp.int32(step), bad_in_a_row=jnp.int32(bad))
        save_state(checkpoints, at, {"next_index": step})
    checkpoints.close()
    kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {3, 5}


def test_a_checksum_sees_every_word_and_its_place(key):
    a = jnp.arange(1, 25, dtype=jnp.float32).reshape(2, 3, 4)
    sums = {
        name: checksums({"a": b})["a"]
        for name, b in {
            "itself": a,
            "reversed": a[::-1],
            "rows swapped": a[:, ::-1],
            "two swapped": a.at[0, 0, 0].set(2).at[0, 0, 1].set(1),
            "one bit": jax.lax.bitcast_convert_type(
                jax.lax.bitcast_convert_type(a, jnp.uint32).at[1, 2, 3].add(1), jnp.float32
            ),
        }.items()
    }
    assert len(set(sums.values())) == len(sums)
    assert checksums({"a": {"b": a}, "c": jnp.zeros((0,))}) == {"a/b": sums["itself"], "c": 0}


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int4", "int8", "uint8", "int16", "int32", "float8_e4m3fn", "float16", "bfloat16"],
)
def test_checksums_of_every_dtype_on_any_mesh(dtype):
    """Of odd length too, the same however it is split, and changed by any one element."""
    a = jnp.arange(8 * 3 * 8).reshape(8, 3, 8) % 2
    a = a.astype(dtype)
    whole = checksums([a])
    for axes in (("batch", None, None), (None, None, "batch"), ("embed", None, "heads")):
        layout = on_mesh(data=2, fsdp=2, tensor=2)
        assert layout is not None
        assert checksums([jax.device_put(a, layout.sharding(*axes))]) == whole
    changed = a.at[7, 2, 7].set(jnp.asarray(0, dtype))
    assert checksums([changed]) != whole and a[7, 2, 7] != changed[7, 2, 7]
    odd = jnp.ones((7,), dtype)
    assert checksums([odd]) != checksums([odd.at[6].set(jnp.asarray(0, dtype))])
    if jnp.issubdtype(a.dtype, jnp.floating):  # a model is read in float32
        assert checksums([a.astype(jnp.float32)]) == whole


def test_keys_are_saved_and_verified(key):
    keys = jax.random.split(key, 3)
    assert checksums([keys]) != checksums([keys[::-1]])
    assert checksums([keys]) == checksums([jax.random.split(key, 3)])


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


def test_an_imported_model_keeps_its_dtype_and_is_read_in_float32_to_train(tmp_path, state):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), state.params)
    bias = {"moe_blocks": {"expert_bias": jnp.arange(4, dtype=jnp.float32)[None]}}
    checkpoints = Checkpoints(tmp_path, CFG)
    checkpoints.save_model(half, bias)
    step, params, router_state = checkpoints.restore_model()  # pyright: ignore
    assert step == 0
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    same((params, router_state), (half, bias))
    layout = on_mesh(fsdp=8)
    params, router_state = model_at(tmp_path, CFG, 0, layout)
    assert {a.dtype for a in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert len(params["embed"]["tokens"].sharding.device_set) == 8
    same(params, jax.tree.map(lambda a: a.astype(jnp.float32), half))
    same(router_state, bias)
    fresh = state_of_model(CFG, params, router_state, layout)
    same(fresh.opt_state, state.opt_state)
    # There is nothing to go on with.
    with pytest.raises(ConfigError, match=r"only the imported model .*init_from="):
        restore_state(checkpoints, layout)
    checkpoints.close()


def test_another_model_is_named(tmp_path, state):
    saved(tmp_path, state)
    wider = dataclasses.replace(CFG, model=dataclasses.replace(CFG.model, vocab_size=64))
    checkpoints = Checkpoints(tmp_path, wider)
    with pytest.raises(ConfigError, match=r"model.vocab_size: 32 there, 64 now"):
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

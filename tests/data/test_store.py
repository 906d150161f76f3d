"""Prepared folders: whole or not there, checked when read, one preparation for all processes."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from moejax.data import store
from moejax.data.sources import DataError

SIZE = 3 * store.BLOCK // 4 + 5  # of uint32: three blocks and a bit


def numbers(size=SIZE):
    return np.random.default_rng(0).integers(0, 2**32, size, np.uint32)


def fill(writer):
    for part in np.array_split(numbers(), 7):
        writer.add("ids", "<u4", part)
    writer.add("text", "|u1", b"bytes")
    writer.add("none", "<i8", [])
    return {"note": 1}


def never(writer):
    raise AssertionError("prepared again")


def prepare(cache, fill=fill, source={"a": 1}):  # noqa: B006  (nobody changes it)
    return store.prepare(cache, source, fill, "a thing")


def folder_of(cache) -> pathlib.Path:
    [path] = [p for p in cache.iterdir() if p.is_dir()]
    return path


def check(stored):
    np.testing.assert_array_equal(stored.arrays["ids"][:], numbers())
    assert stored.arrays["text"][1:3].tobytes() == b"yt" and len(stored.arrays["none"][:]) == 0
    assert stored.meta == {"note": 1}


def test_arrays_are_found_again(tmp_path):
    first, second = prepare(tmp_path), prepare(tmp_path, never)
    check(first)
    check(second)
    assert not first.found and second.found
    assert first.made == second.made == pytest.approx(time.time(), abs=60)
    assert {p.suffix for p in tmp_path.iterdir()} == {"", ".lock"}


def test_any_part_can_be_read_first(tmp_path):
    ids = prepare(tmp_path).arrays["ids"]
    for begin, end in [
        (SIZE - 1, SIZE),
        (0, 1),
        (32_767, 32_770),
        (5, 5),
        (9, 3),
        (SIZE, SIZE + 9),
    ]:
        np.testing.assert_array_equal(ids[begin:end], numbers()[begin:end])
    assert len(ids) == SIZE


@pytest.mark.parametrize("size", [0, 1, store.BLOCK // 4, store.BLOCK // 2, 1_000_003])
def test_checksums_do_not_depend_on_how_it_was_written(tmp_path, size):
    def whole(writer):
        writer.add("ids", "<u4", numbers(size))
        return {}

    def parts(writer):
        writer.add("ids", "<u4", [])
        for at in range(0, size, 99_991):
            writer.add("ids", "<u4", numbers(size)[at : at + 99_991])
        return {}

    sums = []
    for name, way in (("w", whole), ("p", parts)):
        stored = prepare(tmp_path, way, {"way": name})
        np.testing.assert_array_equal(stored.arrays["ids"][:], numbers(size))
        sums.append(stored.arrays["ids"]._sums)
    assert sums[0] == sums[1] and len(sums[0]) == -(-size * 4 // store.BLOCK)


def test_another_source_has_another_folder(tmp_path):
    prepare(tmp_path)
    assert not prepare(tmp_path, source={"a": 2}).found
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2


def test_what_nothing_describes_is_kept_by_open_files_alone(tmp_path):
    stored = prepare(tmp_path, source=None)
    assert list(tmp_path.iterdir()) == []
    check(stored)


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0, store.BLOCK, -1])
def test_a_flipped_bit_is_noticed_when_it_is_read_and_made_again(tmp_path, at):
    prepare(tmp_path)
    flip(folder_of(tmp_path) / "ids.bin", at)
    damaged = prepare(tmp_path, never).arrays["ids"]
    whole_block = slice(store.BLOCK // 2, store.BLOCK // 2 + 5)  # in the third of four
    np.testing.assert_array_equal(damaged[whole_block], numbers()[whole_block])
    with pytest.raises(DataError, match=r"ids.bin: the prepared text is damaged \(its checksum"):
        damaged[:]
    again = prepare(tmp_path)
    assert not again.found
    check(again)


def cut(folder):
    os.truncate(folder / "ids.bin", 1000)


def lengthen(folder):
    with (folder / "text.bin").open("ab") as f:
        f.write(b"more")


def remove(folder):
    (folder / "text.bin").unlink()


def link(folder):
    """A file outside with the same content is still foreign."""
    (folder / "text.bin").rename(folder.parent / "outside")
    (folder / "text.bin").symlink_to(folder.parent / "outside")


def rewrite(change, *, signed):
    def damage(folder):
        lines = (folder / store.INDEX).read_text().split("\n")
        index = json.loads(lines[0])
        change(index)
        body = json.dumps(index)
        crc = store.zlib.crc32(body.encode()) if signed else lines[1]
        (folder / store.INDEX).write_text(f"{body}\n{crc}\n")

    return damage


def text_of_index(text):
    return lambda folder: (folder / store.INDEX).write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lengthen,
        remove,
        link,
        text_of_index(""),
        text_of_index("[]\n223132457\n"),
        lambda folder: flip(folder / store.INDEX, 20),
        rewrite(lambda i: i["meta"].update(note=2), signed=False),
        rewrite(lambda i: i.update(format=store.FORMAT + 1), signed=True),
        rewrite(lambda i: i.update(source={"a": 2}), signed=True),
        rewrite(lambda i: i["arrays"].update({"../../x": i["arrays"]["text"]}), signed=True),
        rewrite(lambda i: i["arrays"]["ids"].update(dtype="|O"), signed=True),
        rewrite(lambda i: i["arrays"]["ids"].update(crc32=[]), signed=True),
        rewrite(lambda i: i["arrays"].update(ids=None), signed=True),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_made_again(tmp_path, damage):
    prepare(tmp_path)
    damage(folder_of(tmp_path))
    again = prepare(tmp_path)
    assert not again.found
    check(again)
    assert prepare(tmp_path, never).found


def test_a_link_in_place_of_the_folder_is_replaced_and_not_followed(tmp_path):
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    cache.mkdir()
    prepare(cache)
    folder = folder_of(cache)
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert not prepare(cache).found and not folder.is_symlink()
    assert (elsewhere / store.INDEX).exists()


def test_a_file_that_becomes_shorter_is_an_error_not_a_crash(tmp_path):
    ids = prepare(tmp_path).arrays["ids"]
    cut(folder_of(tmp_path))
    with pytest.raises(DataError, match="it has become shorter"):
        ids[:]


@pytest.mark.parametrize(
    "code, advice", [(errno.ENOSPC, "make room"), (errno.EACCES, "name another")]
)
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch, code, advice):
    prepare(tmp_path, source={"other": 1})
    before = sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock")
    real, written = store.Writer.add, []

    def add(self, name, dtype, values):
        written.append(name)
        if len(written) == 3:
            raise OSError(code, os.strerror(code))
        real(self, name, dtype, values)

    with monkeypatch.context() as patch:
        patch.setattr(store.Writer, "add", add)
        with pytest.raises(DataError, match=f"a thing cannot be prepared there .*{advice}") as e:
            prepare(tmp_path)
    assert "MOEJAX_CACHE=off" in str(e.value) and str(tmp_path) in str(e.value)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".lock") == before
    check(prepare(tmp_path))


def test_too_many_open_files_are_not_taken_for_damage(tmp_path, monkeypatch):
    prepare(tmp_path)

    def none(*args, **kwargs):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(store.os, "open", none)
        with pytest.raises(DataError, match="ten for each domain are needed"):
            prepare(tmp_path, never)
    check(prepare(tmp_path, never))


CHILD = """
import pathlib, sys, time
from moejax.data import store
cache = pathlib.Path(sys.argv[1])

def fill(writer):
    writer.add("ids", "<u4", range(1000))
    print("half", flush=True)
    time.sleep(float(sys.argv[2]))
    writer.add("ids", "<u4", range(1000))
    with (cache.parent / "prepared").open("a") as f:
        f.write("x")
    return {}

stored = store.prepare(cache, {"child": 1}, fill, "a thing")
assert stored.arrays["ids"][:].tolist() == [*range(1000)] * 2
"""


def child(cache, seconds, **options):
    args = [sys.executable, "-c", CHILD, str(cache), str(seconds)]
    return subprocess.Popen(args, stdout=subprocess.PIPE, text=True, **options)


def test_a_killed_preparation_begins_again(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    with child(cache, 600) as process:
        assert process.stdout and process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    assert len(list(cache.glob("*.tmp"))) == 1
    prepare(cache)  # of another key: it clears up after the dead
    assert not list(cache.glob("*.tmp"))
    with child(cache, 0) as process:
        assert process.wait(60) == 0
    assert (tmp_path / "prepared").read_text() == "x"


def test_of_two_processes_one_prepares(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    children = [child(cache, 1, stderr=subprocess.PIPE) for _ in range(2)]
    said = ""
    for process in children:
        said += process.communicate(timeout=120)[1]
        assert process.returncode == 0
    assert said in ("", "waiting for another process that prepares a thing\n")
    assert (tmp_path / "prepared").read_text() == "x"


def test_the_living_are_left_alone(tmp_path):
    """While one thread prepares, a preparation of another key deletes nothing of it."""
    half, go, found = threading.Event(), threading.Event(), []

    def slow(writer):
        half.set()
        assert go.wait(60)
        return fill(writer)

    thread = threading.Thread(target=lambda: found.append(prepare(tmp_path, slow, {"slow": 1})))
    thread.start()
    assert half.wait(60)
    prepare(tmp_path)
    go.set()
    thread.join(60)
    check(found[0])


def test_without_locks_both_prepare_and_both_have_it(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(store.fcntl, "flock", none)
    inner = []

    def outer(writer):
        inner.append(prepare(tmp_path))  # another process is first
        return fill(writer)

    check(prepare(tmp_path, outer))
    check(inner[0])
    assert not list(tmp_path.glob("*.tmp"))


def test_what_nobody_used_for_a_month_is_deleted(tmp_path):
    prepare(tmp_path, source={"old": 1})
    old = folder_of(tmp_path)
    prepare(tmp_path, source={"used": 1})
    for path in tmp_path.rglob("*"):
        os.utime(path, (1000, 1000))
    assert prepare(tmp_path, never, {"used": 1}).found
    prepare(tmp_path)
    assert not old.exists() and prepare(tmp_path, never, {"used": 1}).found

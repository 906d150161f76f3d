"""Where compiled programs are kept, and how to keep them elsewhere or not at all."""

import os
import subprocess
import sys

import pytest

from moejax.commands import compile_cache


@pytest.fixture
def user(monkeypatch, tmp_path):
    for name in (compile_cache.OFF, compile_cache.DIRECTORY):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield monkeypatch
    os.environ.pop(compile_cache.DIRECTORY, None)


def test_it_is_on_in_the_users_cache(user, tmp_path):
    compile_cache.turn_on()
    path = os.environ[compile_cache.DIRECTORY]
    assert path.startswith(str(tmp_path / "cache/moejax/compiled/")) and os.path.isdir(path)


def test_what_the_environment_says_goes_before(user, tmp_path):
    user.setenv(compile_cache.DIRECTORY, "/elsewhere")
    compile_cache.turn_on()
    assert os.environ[compile_cache.DIRECTORY] == "/elsewhere"
    user.delenv(compile_cache.DIRECTORY)
    user.setenv(compile_cache.OFF, "off")
    compile_cache.turn_on()
    assert compile_cache.DIRECTORY not in os.environ and not (tmp_path / "cache").exists()


def test_a_folder_that_cannot_be_made_is_no_error(user, tmp_path):
    (tmp_path / "cache").write_text("a file")
    compile_cache.turn_on()
    assert compile_cache.DIRECTORY not in os.environ


def test_the_oldest_go_first(tmp_path):
    for age, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(b"x" * 10)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    compile_cache.prune(tmp_path, 25)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_jax_writes_there(user, tmp_path):
    code = (
        "from moejax.__main__ import main; main(['models', 'gpt-2'])\n"
        "import jax; jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)\n"
        "jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)\n"
        "jax.jit(lambda x: x @ x + 1)(jax.numpy.ones((8, 8)))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert list((tmp_path / "cache").rglob("*-cache"))


def test_the_tests_themselves_leave_it_alone():
    assert os.environ[compile_cache.OFF] == "off"

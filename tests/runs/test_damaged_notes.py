"""Damage that is none of the model's: orbax's own notes, and readers of a file that cannot be read."""

import json
import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest

from moejax.config import AttentionConfig, DataConfig, ExperimentConfig, ModelConfig
from moejax.runs import hush
from moejax.runs.checkpoint import NOTE, Checkpoints
from moejax.train.state import create_state, restore_state, save_state

CFG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=32,
        d_model=16,
        num_layers=1,
        d_ff=32,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
    ),
    data=DataConfig(seq_len=8, batch_size=8, tokenizer="byte"),
)


@pytest.fixture(scope="module")
def state():
    return create_state(CFG, jax.random.key(0), None)


@pytest.mark.parametrize(
    "change", [{"metrics": 1}, {"commit_timestamp_nsecs": 10**30}], ids=["type", "range"]
)
def test_a_run_opens_without_the_notes_of_orbax(tmp_path, state, change):
    checkpoints = Checkpoints(tmp_path, CFG)
    for step in (1, 2):
        save_state(checkpoints, state._replace(step=jnp.int32(step)), {"next_index": step})
    checkpoints.close()
    note = tmp_path / "checkpoints" / "2" / NOTE
    note.write_text(json.dumps(json.loads(note.read_text()) | change))

    with pytest.warns(UserWarning, match=f"{NOTE} of a step.*moved to damaged/"):
        again = Checkpoints(tmp_path, CFG)
    restored = restore_state(again)
    assert restored is not None and int(restored[0].step) == 2
    save_state(again, state._replace(step=jnp.int32(3)), {"next_index": 3})
    again.close()
    assert (tmp_path / "damaged" / f"2{NOTE}").exists()
    assert (tmp_path / "checkpoints" / "3" / NOTE).exists()
    Checkpoints(tmp_path, CFG).close()  # once is enough: no warning, which would be an error here


def test_other_errors_at_the_end_of_things_are_still_printed(monkeypatch):
    printed = []
    monkeypatch.setattr(sys, "unraisablehook", lambda u: printed.append(str(u.exc_value)))
    hush.readers()
    hook = sys.unraisablehook
    hush.readers()
    assert sys.unraisablehook is hook  # once

    class Raises:
        def __init__(self, text):
            self.text = text

        def __del__(self):
            raise RuntimeError(self.text)

    class Raises_read_array_index(Raises):  # as orbax's reader is called
        def __del__(self):
            raise RuntimeError(self.text)

    for text in ("Event loop is closed", "of somebody else"):
        Raises(text)
    Raises_read_array_index("Encountered error while reading array index")
    assert printed == ["of somebody else"]


def test_threads_that_are_late_print_nothing(monkeypatch):
    """tensorstore's threads call back into a loop that is closed: pages of tracebacks in front of a warning.
    The same error in the main thread is somebody's, and printed."""
    printed = []
    monkeypatch.setattr(
        sys, "excepthook", lambda kind, value, traceback: printed.append(str(value))
    )
    monkeypatch.setattr(sys, "unraisablehook", lambda u: printed.append(str(u.exc_value)))
    hush.threads()
    hook = sys.excepthook
    # As C code says it, before any error is raised.
    for text in ("Event loop is closed", "of no object"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text), object=None))
    assert printed.pop() == "of no object" and not printed
    hush.threads()
    assert sys.excepthook is hook  # once

    def call():
        for text in ("Event loop is closed", "of somebody else"):
            error = RuntimeError(text)
            hook(type(error), error, None)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert printed == ["of somebody else"]
    call()
    assert printed == ["of somebody else", "Event loop is closed", "of somebody else"]

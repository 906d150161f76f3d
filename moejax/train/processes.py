"""Several processes, one program: starting them, who goes first, who holds which rows, when to stop.

Every process runs the same loop on its own devices. `jax.distributed` finds the others; nothing else talks
between them but the compiled step, orbax and the few functions here.
"""

import contextlib
import os
import signal

import jax
import numpy as np
from jax.experimental import multihost_utils

from moejax import axes
from moejax.config import ConfigError
from moejax.sharding import Layout

MODES = ("none", "auto")


def start(
    mode: str = "none",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of this run; must come before anything else touches a device.

    Args:
      mode: 'auto' lets jax find the cluster (Slurm, Open MPI, Kubernetes, TPU pods); 'none': this process
        is alone unless `coordinator` is given.
      coordinator: 'host:port' of process 0, where no cluster says so.
      num_processes, process_id: needed with `coordinator`.

    Raises ConfigError if a value is missing or no cluster is found.
    """
    if mode not in MODES:
        raise ConfigError(f"--distributed={mode!r}: choices are {', '.join(MODES)}")
    explicit = {"num_processes": num_processes, "process_id": process_id}
    if coordinator is None:
        given = [k for k, v in explicit.items() if v is not None]
        if given:
            raise ConfigError(
                f"--{given[0]} needs --coordinator=HOST:PORT, the address of process 0"
            )
        if mode == "none":
            return
    else:
        missing = [f"--{k}" for k, v in explicit.items() if v is None]
        if missing:
            raise ConfigError(f"--coordinator={coordinator} needs {' and '.join(missing)} too")
        if not coordinator.rpartition(":")[2].isdigit():
            raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as e:
        raise ConfigError(
            f"--distributed={mode}: {e} No cluster was found (Slurm, Open MPI, Kubernetes, TPU pod)? "
            "Then give --coordinator=HOST:PORT --num_processes=N --process_id=I"
        ) from e
    except RuntimeError as e:  # a cluster that does not answer, or does not allow to be asked
        raise ConfigError(f"could not join the other processes: {e}") from e


def is_first() -> bool:
    """Whether this process prints, logs and writes what is not sharded."""
    return jax.process_index() == 0


@contextlib.contextmanager
def first_goes_first():
    """Process 0 runs the body before the others do: they find what it wrote.

    If it raises, the others are let in all the same, to meet the same error rather than to wait.
    """
    if not is_first():
        multihost_utils.sync_global_devices("first")
    try:
        yield
    finally:
        if is_first() and jax.process_count() > 1:
            multihost_utils.sync_global_devices("first")


def ordered_devices() -> list[jax.Device]:
    """All devices, those of one process side by side, so that it holds neighbouring rows of a batch."""
    return sorted(jax.devices(), key=lambda d: (d.process_index, d.id))


def check_layout(layout: Layout | None) -> None:
    """ConfigError if the mesh leaves out a device of another process: all must take part."""
    used = 1 if layout is None else layout.mesh.size
    if jax.process_count() > 1 and used != jax.device_count():
        raise ConfigError(
            f"the mesh has {used} devices, but {jax.process_count()} processes hold "
            f"{jax.device_count()}: with several processes it must use them all; mesh.data=-1 would"
        )


# --------------------------------------------------------------------------------------------------
# Batches. The global batch does not depend on the number of processes.


def rows_here(layout: Layout | None, batch_size: int, seq_len: int) -> tuple[int, int]:
    """(index, count): this process loads the index-th of count equal parts of every batch.

    Processes whose devices hold the same rows (tensor parallelism across hosts) load the same part.
    """
    if layout is None:
        return 0, 1
    sharding = layout.sharding(axes.BATCH, axes.SEQ)
    where = sharding.addressable_devices_indices_map((batch_size, seq_len))
    ranges = {index[0].indices(batch_size)[:2] for index in where.values()}
    low, high = min(a for a, _ in ranges), max(b for _, b in ranges)
    held = sum(b - a for a, b in ranges)
    if held != high - low or batch_size % held or low % held:
        raise ConfigError(
            "mesh: the rows of a batch that this process holds do not lie side by side; leave the "
            "'batch' row of mesh.rules in the order data, fsdp, expert"
        )
    return low // held, batch_size // held


def place_rows(rows: dict[str, np.ndarray], layout: Layout | None, batch_size: int) -> dict:
    """A global batch from this process's part of it."""
    if layout is None:
        return rows
    sharding = layout.sharding(axes.BATCH, axes.SEQ)
    return {
        name: jax.make_array_from_process_local_data(sharding, a, (batch_size, *a.shape[1:]))
        for name, a in rows.items()
    }


def place_whole(batch: dict[str, np.ndarray], layout: Layout | None) -> dict:
    """A global batch that every process holds whole: each device takes its rows."""
    if layout is None:
        return batch
    sharding = layout.sharding(axes.BATCH, axes.SEQ)
    return {
        name: jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index])
        for name, a in batch.items()
    }


# --------------------------------------------------------------------------------------------------
# Stopping.


class StopRequest:
    """Ctrl-C and SIGTERM, as a question to ask after every step. As a context manager it takes the two
    signals over, and gives them back.

    With several processes a SIGTERM to any of them stops all after the same step: jax's preemption
    service, which `jax.distributed` starts, agrees on it.
    """

    def __enter__(self):
        self.asked = False
        several = jax.process_count() > 1
        # The preemption service has taken SIGTERM itself; Ctrl-C is handed on to it.
        numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
        self.before = {n: signal.getsignal(n) for n in numbers}
        for number in numbers:
            signal.signal(number, self._hand_on if several else self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        del frame
        self.asked = True
        signal.signal(number, signal.SIG_DFL)  # a second one interrupts at once

    def _hand_on(self, number, frame):
        del frame
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def now(self, step: int) -> bool:
        """Whether to save and leave after this step; to be asked once a step, in every process."""
        return self.asked or multihost_utils.reached_preemption_sync_point(step)

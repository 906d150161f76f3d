"""Starts and coordinates several processes of one program.

Every process runs the same loop on its own devices. `jax.distributed` finds the others. Only the compiled
step, orbax, `moejax.train.signals` and the few functions here communicate between them.
"""

import contextlib
import os
import sys
from typing import NoReturn

import jax

from moejax.config import ConfigError
from moejax.runs import agree

MODES = ("none", "auto")


def start(
    mode: str = "none",
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes of this run. Call it before anything uses a device.

    Args:
      mode: 'auto' lets jax find the cluster (Slurm, Open MPI, Kubernetes, TPU pods). With 'none' this process
        is alone unless `coordinator` is given.
      coordinator: 'host:port' of process 0, if no cluster provides it.
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
    except RuntimeError as e:  # the cluster does not answer, or refuses
        raise ConfigError(f"could not join the other processes: {e}") from e


def is_first() -> bool:
    """Whether this process prints, logs and writes what is not sharded."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print, in process 0 alone."""
    if is_first():
        print(text)


@contextlib.contextmanager
def first_goes_first():
    """Process 0 runs the body before the others, which then find the files that it wrote. If it raises, so do
    they."""
    if not is_first():
        agree.raise_together(None)
    error: Exception | None = None
    try:
        yield
    except Exception as e:
        error = e
        raise
    finally:
        if is_first():
            agree.first_error(error)


def leave(code: int) -> NoReturn:
    """End this process, although others may wait for it: they notice, and end too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ordered_devices() -> list[jax.Device]:
    """All devices, sorted by process, so that each process holds neighbouring rows of a batch."""
    return sorted(jax.devices(), key=lambda d: (d.process_index, d.id))


def check_devices(used: int) -> None:
    """Raises ConfigError if several processes would not all take part in a mesh of `used` devices."""
    if jax.process_count() > 1 and used != jax.device_count():
        raise ConfigError(
            f"the mesh has {used} devices, but {jax.process_count()} processes hold "
            f"{jax.device_count()}: with several processes it must use them all; mesh.data=-1 would work"
        )

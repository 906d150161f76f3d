"""Devices: peak FLOP/s, bandwidth, memory, link and price. From the table in hardware.json, with sources, or
measured here."""

import dataclasses
import difflib
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError
from moejax.cost.available import available_memory

TABLE = pathlib.Path(__file__).with_name("hardware.json")


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator, or this machine's CPU.

    Attributes:
      name: key of the table.
      memory: bytes.
      bandwidth: bytes per second of its memory.
      flops: peak dense FLOP/s by dtype.
      link: bytes per second one device sends to its neighbours; 0 = unknown.
      price: USD per hour; None = unknown.
      source: where the numbers are from.
    """

    name: str
    memory: float
    bandwidth: float
    flops: dict[str, float]
    link: float
    price: float | None
    source: str

    @property
    def platform(self) -> str:
        """'cpu', 'gpu' or 'tpu', as JAX calls it."""
        return "cpu" if self.name == "cpu" else "tpu" if self.name.startswith("tpu") else "gpu"

    def peak(self, dtype: str) -> float:
        """FLOP/s in `dtype`; where the table has no figure for it, bfloat16's, an upper bound."""
        if dtype in self.flops:
            return self.flops[dtype]
        return self.flops["bfloat16"] if "bfloat16" in self.flops else max(self.flops.values())


def names() -> list[str]:
    return [n for n in json.loads(TABLE.read_text()) if not n.startswith("_")]


def device_of_kind(kind: str) -> Device | None:
    """The device of the table that JAX calls `kind` (its `device_kind`); None if there is none."""
    rows = json.loads(TABLE.read_text())
    return next((load_device(n) for n in names() if kind in rows[n]["jax_kinds"]), None)


def load_device(name: str, price: float | None = None) -> Device:
    """A device of the table, or 'cpu', measured here; `price` (USD per hour) replaces the table's.

    Raises ConfigError for an unknown name (with the nearest ones) and a negative price.
    """
    if price is not None and not 0 <= price < float("inf"):
        raise ConfigError(f"price={price} must be USD per device and hour, such as 2.0")
    table = json.loads(TABLE.read_text())
    if name == "cpu":
        device = measure_cpu()
    else:
        if name not in names():
            near = difflib.get_close_matches(name.lower(), names(), n=2, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(f"unknown device {name!r}; {hint}known: cpu, {', '.join(names())}")
        row = table[name]
        device = Device(
            name=name,
            memory=row["memory"] * 1e9,
            bandwidth=row["bandwidth"] * 1e9,
            flops={k: v * 1e12 for k, v in row["flops"].items()},
            link=row["link"] * 1e9,
            price=row["price"],
            source=row["source"],
        )
    return device if price is None else dataclasses.replace(device, price=price)


# --------------------------------------------------------------------------------------------------
# The devices at hand.


def this_device(dtype) -> Device:
    """The first local device: from the table if it is in there, else measured for a moment."""
    here = jax.local_devices()[0]
    limit = (here.memory_stats() or {}).get("bytes_limit")
    known = device_of_kind(here.device_kind)
    if known is not None:  # jax may be told to take a part of its memory only
        return dataclasses.replace(known, memory=min(known.memory, float(limit or known.memory)))
    shared = _sharing()
    return Device(
        name="cpu" if here.platform == "cpu" else here.device_kind,
        memory=float(limit or available_memory() / shared),
        bandwidth=copy_bandwidth() / shared,
        flops={jnp.dtype(dtype).name: matmul_peak(dtype) / shared},
        link=0.0,
        price=None,
        source="measured at the start of the run",
    )


def measure_cpu() -> Device:
    """This machine as numpy finds it, whatever accelerator jax would use: float32 matmul and copy."""
    a, big = np.ones((768, 768), np.float32), np.ones(2**24, np.float32)
    matmul = _best_seconds(np.matmul, a, a, np.empty_like(a))
    return Device(
        name="cpu",
        memory=available_memory(),
        bandwidth=2 * big.nbytes / _best_seconds(np.copyto, np.empty_like(big), big),
        flops={"float32": 2 * len(a) ** 3 / matmul},
        link=0.0,
        price=None,
        source="measured now",
    )


def _sharing() -> int:
    """Devices that share what one of them can do alone: virtual CPU devices share the cores."""
    return jax.local_device_count() if jax.default_backend() == "cpu" else 1


def total_peak(dtype, devices: int) -> float:
    """FLOP/s of so many devices of the kind at hand, from a matmul on one."""
    return matmul_peak(dtype) * devices / _sharing()


def matmul_peak(dtype) -> float:
    """FLOP/s of the best of a few square matmuls on one device."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), dtype)
    return 2 * size**3 / _best_seconds(jax.jit(jnp.dot), a, a)


def copy_bandwidth() -> float:
    """Bytes per second of the best of a few passes over an array, read and written."""
    a = jnp.ones(2**24, jnp.float32)
    return 2 * a.nbytes / _best_seconds(jax.jit(lambda x: x + 1), a)


# A machine at work on something else for a moment would be taken for a slow one.
SECONDS = 0.3


def _best_seconds(f, *args) -> float:
    """Of at least five calls, and of as many as fit in SECONDS."""
    jax.block_until_ready(f(*args))
    times: list[float] = []
    while len(times) < 5 or sum(times) < SECONDS:
        start = time.perf_counter()
        jax.block_until_ready(f(*args))
        times.append(time.perf_counter() - start)
    return min(times)

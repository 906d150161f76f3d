"""Devices: peak FLOP/s, bandwidth, memory, link and price. The table is hardware.json, with
sources."""

import dataclasses
import difflib
import json
import pathlib
import time

from moejax.config import ConfigError

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
    if name == "cpu":
        device = measure_cpu()
    else:
        table = json.loads(TABLE.read_text())
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


def measure_cpu(size: int = 768, repeats: int = 4) -> Device:
    """This machine: the best of a few float32 matmuls and copies, in about a tenth of a second."""
    import numpy as np

    a = np.ones((size, size), np.float32)
    big = np.ones(2**24, np.float32)
    out, copy = np.empty_like(a), np.empty_like(big)

    def best(run):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    matmul = best(lambda: np.matmul(a, a, out=out))
    copying = best(lambda: np.copyto(copy, big))
    return Device(
        name="cpu",
        memory=float(physical_memory()),
        bandwidth=2 * big.nbytes / copying,
        flops={"float32": 2 * size**3 / matmul},
        link=0.0,
        price=None,
        source="measured now: float32 matmul and copy",
    )


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""How much of this machine's memory a process may still take."""

import contextlib
import os
import pathlib

MEMINFO = pathlib.Path("/proc/meminfo")
OWN_GROUPS, GROUPS = pathlib.Path("/proc/self/cgroup"), pathlib.Path("/sys/fs/cgroup")
# Files of a control group, of version 2 and of version 1: its limit, what it uses, and the key in memory.stat
# of what it only caches.
VERSIONS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def physical_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory(
    meminfo: pathlib.Path = MEMINFO,
    own_groups: pathlib.Path = OWN_GROUPS,
    groups: pathlib.Path = GROUPS,
) -> float:
    """Bytes that nothing else uses, in this machine and in this process's control groups (containers)."""
    left = [float(physical_memory())]
    with contextlib.suppress(OSError, ValueError):
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        left.append(
            1024.0 * int(rows["MemAvailable"].split()[0]) if "MemAvailable" in rows else left[0]
        )
    with contextlib.suppress(OSError):
        for line in own_groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "" or "memory" in controllers.split(","):
                root = groups if controllers == "" else groups / "memory"
                left += _left_in(root, path)
    return min(left)


def _left_in(root: pathlib.Path, path: str) -> list[float]:
    """What each control group from `path` up to the root leaves, where it has a limit."""
    own = root / path.lstrip("/")
    found = []
    for group in (own, *own.parents):
        if not group.is_relative_to(root):
            break
        for limit, used, cached in VERSIONS:
            with contextlib.suppress(OSError, ValueError):
                most = int((group / limit).read_text())  # "max": none
                found.append(float(most - int((group / used).read_text()) + _stat(group, cached)))
    return found


def _stat(group: pathlib.Path, key: str) -> int:
    with contextlib.suppress(OSError, ValueError):
        rows = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return int(rows.get(key, 0))
    return 0

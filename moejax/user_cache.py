"""The user's cache folder: what can be made again, kept so that the same command begins sooner.

MOEJAX_CACHE=off keeps nothing; XDG_CACHE_HOME says where it lies. This must not import JAX.
"""

import os
import pathlib

SWITCH = "MOEJAX_CACHE"


def switched_off(name: str) -> bool:
    """Whether the environment's variable of that name says 'off'."""
    return os.environ.get(name, "").lower() in ("off", "0", "false")


def place(name: str) -> pathlib.Path | None:
    """~/.cache/moejax/NAME (or in XDG_CACHE_HOME), which is made. None if the environment says 'off', or if
    there is no home, or one that cannot be written."""
    if switched_off(SWITCH):
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = pathlib.Path(home) / "moejax" / name
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path if os.access(path, os.W_OK) else None

"""Silence for readers that orbax leaves behind when files cannot be read. When they end, asyncio prints their
errors, and Python what they can no longer tell anybody; the error that matters has been raised by then.
"""

import atexit
import gc
import logging
import sys
import threading
import time
from collections.abc import Callable


class Quiet:
    """A `sys.unraisablehook` that leaves out what is of those readers, and of their threads."""

    def __init__(self, print_others: Callable):
        self._print_others = print_others

    def __call__(self, unraisable) -> None:
        late = _too_late(unraisable.exc_value)
        if not late and "_read_array_index" not in repr(unraisable.object):
            self._print_others(unraisable)


class QuietThreads:
    """A `sys.excepthook` that leaves out what their threads, which no Python code began, cannot tell."""

    def __init__(self, print_others: Callable):
        self._print_others = print_others

    def __call__(self, kind, value, traceback) -> None:
        here = threading.get_ident() == threading.main_thread().ident
        if here or not _too_late(value):
            self._print_others(kind, value, traceback)


def _too_late(error) -> bool:
    return str(error) == "Event loop is closed"


def threads() -> None:
    """Before anything is read: a thread may be late before the error is raised that it is late for."""
    if not isinstance(sys.excepthook, QuietThreads):
        sys.excepthook = QuietThreads(sys.excepthook)
    if not isinstance(sys.unraisablehook, Quiet):
        sys.unraisablehook = Quiet(sys.unraisablehook)


def readers() -> None:
    """From now on."""
    threads()
    logging.getLogger("asyncio").disabled = True
    atexit.unregister(_let_them_end)  # once is enough
    atexit.register(_let_them_end)


def _let_them_end() -> None:
    """Before the interpreter takes down the hook."""
    time.sleep(0.2)
    gc.collect()

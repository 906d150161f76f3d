"""Stops a run on Ctrl-C and SIGTERM."""

import os
import signal

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Remembers Ctrl-C and SIGTERM, so that the loop can ask for them after every step.

    A context manager: it handles the two signals inside, and restores the old handlers at the end. With several
    processes, a SIGTERM to any of them stops all after the same step; jax's preemption service, which
    `jax.distributed` starts, agrees on that step.
    """

    def __enter__(self):
        self.asked = False
        several = jax.process_count() > 1
        # The preemption service handles SIGTERM itself; pass Ctrl-C on to it.
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
        """Whether to save and stop after this step. Every process must ask once a step."""
        return self.asked or multihost_utils.reached_preemption_sync_point(step)

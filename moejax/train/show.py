"""Shows how far a run is: a bar on a terminal, plain lines where there is none."""

import sys
import time

from tqdm import tqdm

from moejax.text import seconds_text

EVERY_SECONDS = 10.0  # between two plain lines


class Show:
    """Of one run, from step `first` to `steps`. Shows nothing if it is not `on`."""

    def __init__(self, name: str, first: int, steps: int, *, on: bool = True):
        self.first, self.steps, self.on = first, steps, on
        self.plain = on and not sys.stderr.isatty()
        self.started, self.next_line = time.monotonic(), 0.0
        self.bar = tqdm(
            total=steps, initial=first, desc=name, unit="step", disable=not on or self.plain
        )
        self.bar.set_postfix_str("compiling")
        if self.plain:
            self._line(f"step {first}/{steps}: compiling")

    def step(self, done: int) -> None:
        """A step is done."""
        self.bar.update(done - self.bar.n)

    def values(self, done: int, loss: float, tokens_per_second: float) -> None:
        """What was logged after a step."""
        self.bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{tokens_per_second:.0f}")
        now = time.monotonic()
        if self.plain and (now >= self.next_line or done == self.steps):
            left = (now - self.started) / max(done - self.first, 1) * (self.steps - done)
            end = f", {seconds_text(left)} left" if done < self.steps else ""
            self._line(
                f"step {done}/{self.steps}: loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s{end}"
            )
            self.next_line = now + EVERY_SECONDS

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.plain:
            self._line(text)
        elif self.on:
            self.bar.write(text)

    def close(self) -> None:
        self.bar.close()

    def _line(self, text: str) -> None:
        print(text, flush=True)

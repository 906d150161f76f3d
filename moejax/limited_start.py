"""What `moejax.limited.run` starts: sets the limits of this process, then runs the program."""

import contextlib
import resource
import runpy
import sys


def main(program: str, seconds: str, megabytes: str) -> None:
    for limit, value in (
        (resource.RLIMIT_CPU, int(seconds)),
        (resource.RLIMIT_AS, int(megabytes) << 20),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        # macOS refuses some of these; the time limit of the parent holds there too.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (value, value))
    runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])

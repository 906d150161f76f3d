"""Renders a chat template: a program that `moejax.evals.chat` runs as a process of its own.

A template comes with a checkpoint and is a program by strangers. Jinja's sandbox keeps it from files, imports
and private attributes, but not from running or growing for ever; only limits on a process do that.

stdin: {"template": .., "context": {..}} as JSON; stdout: the text. Exit code 1: stderr's last line says why.
"""

import contextlib
import datetime
import json
import resource
import sys

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

CPU_SECONDS = 5
MEMORY_BYTES = 1 << 30


def limit() -> None:
    for what, value in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        # macOS refuses some of these; the time limit of the parent holds there too.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (value, value))


def render(template: str, context: dict) -> str:
    """The template's text, with the functions and filters that published templates expect."""

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, indent=None, ensure_ascii=False, separators=None, sort_keys=False):
        # Jinja's own filter escapes for HTML.
        return json.dumps(
            value,
            indent=indent,
            ensure_ascii=ensure_ascii,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
    return environment.from_string(template).render(**context)


def main() -> int:
    limit()
    request = json.loads(sys.stdin.buffer.read())
    try:
        text = render(request["template"], request["context"])
    # A template can fail in any way that Python code can.
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError) as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    except (MemoryError, RecursionError, TypeError, ValueError) as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    sys.stdout.buffer.write(text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Renders a chat template. `moejax.evals.chat` runs this file as a separate process, with limits.

A template comes with a checkpoint and is a program written by strangers. Jinja's sandbox keeps it away from
files, imports and private attributes, but does not bound its time or memory.

stdin: {"template": .., "context": {..}, "most": characters} as JSON; stdout: the text. Exit code 1: stderr's
last line says why.
"""

import datetime
import json
import sys

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(jinja2.ext.Extension):
    """{% generation %} .. {% endgeneration %} marks text to train on. It is rendered like any other text."""

    tags = {"generation"}  # noqa: RUF012 (as declared there)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A macro, as in `transformers`: variables set inside are not visible outside.
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller):
        return caller()


def render(template: str, context: dict, most: int) -> str:
    """The template's text, with the functions and filters that published templates expect."""

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes for HTML.
        return json.dumps(
            value,
            indent=indent,
            ensure_ascii=ensure_ascii,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
    pieces, left = [], most
    for piece in environment.from_string(template).generate(**context):
        pieces.append(piece)
        left -= len(piece)
        if left < 0:
            raise ValueError(f"it writes more than {most:,} characters")
    return "".join(pieces)


def main() -> int:
    request = json.loads(sys.stdin.buffer.read())
    try:
        text = render(**request).encode()
    # A template can fail in any way that Python code can.
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError) as e:
        print(f"{type(e).__name__}: {e}"[:1000], file=sys.stderr)
        return 1
    except (MemoryError, RecursionError, TypeError, ValueError, AssertionError) as e:
        print(f"{type(e).__name__}: {e}"[:1000], file=sys.stderr)
        return 1
    sys.stdout.buffer.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`moejax models`: published models side by side."""

import sys

from absl import flags

from moejax.commands.flags import parse
from moejax.cost import models as table
from moejax.text import FORMATS, render

USAGE = """\
usage: moejax models MODEL MODEL ...           names of published models, or config.json files
   e.g. moejax models deepseek-moe-16b llama-2-7b gpt-2-xl gpt-4 --baseline=llama-2-7b --plot=x.png"""


def main(argv: list[str]) -> int:
    """`moejax models ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    flags.DEFINE_string("baseline", "", "Model FLOPs are relative to [the first].", flag_values=fv)
    flags.DEFINE_integer("context", 4096, "Tokens per sequence.", flag_values=fv)
    flags.DEFINE_enum(
        "format", "table", FORMATS, "For people, or with exact numbers.", flag_values=fv
    )
    flags.DEFINE_string(
        "plot", None, "Draw the comparison into this file (.png, .svg, .pdf).", flag_values=fv
    )
    flags.DEFINE_string(
        "context_plot",
        None,
        "Draw what one more token and its cache cost, for 1k to 1M tokens of context, into this file.",
        flag_values=fv,
    )
    models = parse("models", USAGE, fv, argv)
    if models is None:
        return 0
    rows = table.compare(models, fv.baseline, fv.context)
    baseline = fv.baseline or models[0]
    tables = {
        "table": lambda: table.text_tables(rows, baseline, fv.context),
        "markdown": lambda: [table.wide_table(rows, baseline, fv.context)],
        "csv": lambda: [table.exact_table(rows)],
        "json": lambda: [table.exact_table(rows)],
    }[fv.format]()
    print(render(tables, fv.format), end="")
    if fv.plot:
        from moejax.cost.plot import plot

        plot(rows, fv.plot, fv.context)
        print(f"wrote {fv.plot}", file=sys.stderr)
    if fv.context_plot:
        from moejax.cost import context_plot

        context_plot.plot({n: table.load_architecture(n) for n in models}, fv.context_plot)
        print(f"wrote {fv.context_plot}", file=sys.stderr)
    return 0

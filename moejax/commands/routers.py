"""`moejax routers`: the table of routers, and the page of each. docs/routers.md is made from the same facts."""

import dataclasses
import inspect
import pathlib
import re
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from moejax.commands.flags import parse
from moejax.config import ConfigError, ExperimentConfig, ModelConfig, MoEConfig
from moejax.config_io import with_recipe
from moejax.options import bounds_text, choice_problem
from moejax.routers import ROUTERS
from moejax.routers.contract import RouterOptions, tokens_of
from moejax.routers.left_out import LEFT_OUT
from moejax.text import Table, render

USAGE = """\
usage: moejax routers                           the table
       moejax routers NAME                      its page: equation, options, what its paper sets
       moejax routers --docs=docs/routers.md    write table and pages into that page, between its two marks"""
BEGIN, END = "<!-- begin: moejax routers -->", "<!-- end: moejax routers -->"


SMALL = ExperimentConfig(
    model=ModelConfig(
        vocab_size=256, d_model=64, moe=MoEConfig(num_experts=16, experts_per_token=4, d_expert=32)
    )
)


class Facts(NamedTuple):
    """What is true of a router with its paper's settings.

    Attributes:
      form: 'token', 'slot', ..
      causal: whether text can be generated.
      used: experts that a token uses on average, of `of`, in a layer of 16 experts.
      of: experts of that layer.
      state, losses, specials: names of what its rule moves, of its losses, and kinds of special experts.
      options: (name, default, choices or range, meaning) of each.
    """

    name: str
    source: str
    form: str
    causal: bool
    used: float
    of: int
    state: tuple[str, ...]
    losses: tuple[str, ...]
    specials: tuple[str, ...]
    options: list[tuple[str, str, str, str]]


def main(argv: list[str]) -> int:
    """`moejax routers ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    flags.DEFINE_string("docs", None, "Markdown file to write into.", flag_values=fv)
    names = parse("routers", USAGE, fv, argv)
    if names is None:
        return 0
    for name in names:
        problem = choice_problem("moejax routers", name, ROUTERS)
        if problem:
            raise ConfigError(problem)
    if fv.docs:
        path = pathlib.Path(fv.docs)
        path.write_text(in_page(path.read_text("utf-8"), fv.docs), "utf-8")
    elif names:
        print("\n".join(page(name) for name in names))
    else:
        print(render([table()]) + "\n" + render([left_out()]))
    return 0


def in_page(text: str, path: str = "the page") -> str:
    """A Markdown page with what stands between its marks made anew."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{path}: no line {BEGIN} with a line {END} after it")
    linked = [_linked(table()), _linked(left_out())]
    pages = [f"### {name}\n\n{page(name, 'markdown')}" for name in ROUTERS]
    made = "\n".join([render(linked[:1], "markdown"), *pages, render(linked[1:], "markdown")])
    return f"{head}{begin}\n\n{made}\n{end}{tail}"


def table() -> Table:
    """Every router in a line."""
    rows = []
    for name in ROUTERS:
        f = facts(name)
        rows.append(
            (
                name,
                f.source,
                f.form,
                "yes" if f.causal else "no",
                f"{f.used:.3g} of {f.of}",
                *(", ".join(names) for names in (f.state, f.losses, f.specials)),
            )
        )
    header = ("name", "from", "form", "causal", "experts", "state", "losses", "special experts")
    note = "With what each paper sets. Experts: used by a token on average, in a small layer."
    return Table("", header, rows, note)


def left_out() -> Table:
    return Table("Not here, and why", ("design", "from", "why"), LEFT_OUT)


def page(name: str, style: str = "table") -> str:
    """All about one router."""
    f, router = facts(name), ROUTERS[name]
    about = inspect.cleandoc(router.about)
    if style == "markdown":
        about = f"```text\n{about}\n```"
    state, losses, specials = (", ".join(n) or "none" for n in (f.state, f.losses, f.specials))
    words = f"Form: {f.form}. Generates text: {'yes' if f.causal else 'no'}. State: {state}. "
    words += f"Losses: {losses}. Special experts: {specials}."
    flags_ = f"--config.model.moe.router.name={name}"
    flags_ += "".join(f" --config.{key}={value}" for key, value in router.recipe)
    use = f"As its paper has it: `{flags_}`" if style == "markdown" else f"Its flags: {flags_}"
    parts = [f"{name}: {f.source}"] if style == "table" else [_link(f.source)]
    parts += [about, textwrap.fill(words, 112), use]
    if not f.options:
        parts += ["It has no options.\n"]
    elif style == "markdown":
        options = Table("", ("option", "default", "may be", "meaning"), f.options)
        parts += [render([options], style)]
    else:
        parts += ["\n".join(_as_lines(*option) for option in f.options) + "\n"]
    return "\n\n".join(parts)


def _as_lines(option: str, default: str, may_be: str, meaning: str) -> str:
    head = f"  {option} [{default}]" + (f": {may_be}" if may_be else "")
    indent = 6 * " "
    said = textwrap.fill(meaning, 112, initial_indent=indent, subsequent_indent=indent)
    return f"{head}\n{said}" if meaning else head


def facts(name: str) -> Facts:
    """See `Facts`. The router is traced, not computed."""
    router, cfg = ROUTERS[name], with_recipe(SMALL, name)
    static = cfg.model.router_config(cfg.objective)
    params = {
        key: jax.ShapeDtypeStruct(spec.shape, jnp.float32)
        for key, spec in router.param_specs(static).items()
    }
    state = jax.eval_shape(lambda: router.init_state(static, 0))

    def traced(params, state, x_TD, ids_T, key):
        carried_TW = jnp.zeros((64, width)) if width else None
        tokens = tokens_of(x_TD, 32, ids_T=ids_T, key=key, carried_TW=carried_TW)
        return router.route(params, state, tokens, static)

    width = router.carries(static)
    x_TD, ids_T = jnp.zeros((64, static.d_model)), jnp.zeros(64, jnp.int32)
    out = jax.eval_shape(traced, params, state, x_TD, ids_T, jax.random.key(0))
    kinds = router.specials(static)
    return Facts(
        name=name,
        source=router.source,
        form=router.form,
        causal=router.causal,
        used=router.experts_used(static),
        of=static.num_experts,
        state=tuple(state),
        losses=tuple(out.losses),
        specials=tuple(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)),
        options=_options(router.options),
    )


def _options(options: RouterOptions) -> list[tuple[str, str, str, str]]:
    meanings, rows = _meanings(type(options)), []
    for field in dataclasses.fields(options):
        if field.name == "name":
            continue
        default, limits = getattr(options, field.name), field.metadata
        may_be = ", ".join(limits["choices"]) if "choices" in limits else ""
        if "bounds" in limits:
            may_be = bounds_text(**limits["bounds"])
        if isinstance(default, bool):
            may_be = "True, False"
        rows.append((field.name, str(default), may_be, meanings.get(field.name, "")))
    return rows


def _meanings(cls: type) -> dict[str, str]:
    """Field -> the comment beside or above it in the class's source; {} where that cannot be read."""
    out, above = {}, []
    for parent in reversed(cls.__mro__[:-1]):
        try:
            lines = inspect.getsource(parent).splitlines()
        except (OSError, TypeError):
            continue
        for line in lines:
            code, _, comment = line.partition("#")
            field = re.match(r"\s+(\w+): ", code)
            if field:
                said = [*above, comment.strip()] if comment else above
                out[field[1]] = " ".join(said)
            above = [*above, comment.strip()] if comment and not code.strip() else []
    return out


def _linked(t: Table) -> Table:
    at = t.header.index("from")
    rows = [(*row[:at], _link(row[at]), *row[at + 1 :]) for row in t.rows]
    if t.header[0] == "name":
        rows = [(f"[{row[0]}](#{row[0]})", *row[1:]) for row in rows]
    return dataclasses.replace(t, rows=rows)


def _link(source: str) -> str:
    """A source with its arXiv ids as links."""
    return re.sub(r"\b\d{4}\.\d{5}\b", lambda m: f"[{m[0]}](https://arxiv.org/abs/{m[0]})", source)

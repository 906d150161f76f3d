"""`moejax routes`: which experts each token of a text has, layer by layer."""

import json
import pathlib
import sys
from collections.abc import Iterable, Iterator

from absl import flags
from tqdm import tqdm

from moejax.commands.flags import define_step, parse_needed
from moejax.config import ConfigError, ExperimentConfig
from moejax.evals import trace, trace_agreement, trace_files, trace_page
from moejax.evals.routes import check_routes
from moejax.evals.trace import Records
from moejax.evals.trace_agreement import WAYS
from moejax.runs.open import OpenRun, read_config
from moejax.runs.restore import check_step
from moejax.sharding import Layout
from moejax.text import Table, plain, render

USAGE = """\
usage: moejax routes --workdir=RUN --text="def f(x):"               which experts each token has, as a table
       moejax routes --workdir=RUN --prompt="def " [--chat]         the model goes on; its tokens are shown, too
       moejax routes --workdir=RUN --out=FILE.parquet               the held-out text that `evaluate` reads
       moejax routes --workdir=RUN --sources=wiki=FILES --out=..    any text, however long
       moejax routes --workdir=RUN --compare=float32,bfloat16       share of routes that differ;
                                                                    also prefill,decode and mesh=data=2
       formats: table, jsonl, parquet, npz, html (--format, or the ending of --out)"""
SHOWN_TOKENS, SHOWN_LAYERS = 60, 4  # of a table


def main(argv: list[str]) -> int:
    """`moejax routes ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    text, whole, several = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_list
    text("workdir", None, "Folder of a run, trained or imported.", flag_values=fv)
    text("text", None, "A text to read.", flag_values=fv)
    text("prompt", None, "A text that the model continues first.", flag_values=fv)
    flags.DEFINE_boolean("chat", False, "With --prompt: ask a chat model.", flag_values=fv)
    whole("max_new", None, "With --prompt: tokens to write.", flag_values=fv, lower_bound=1)
    whole("seed", 0, "With --prompt: the same seed writes the same.", flag_values=fv)
    several("sources", [], "Text: 'domain=FILES', several with commas.", flag_values=fv)
    whole("tokens", None, "Stop after this many [all].", flag_values=fv, lower_bound=1)
    whole("seq_len", None, "Tokens per row [as in the run].", flag_values=fv, lower_bound=1)
    whole("batch_size", None, "Rows at once [the run's].", flag_values=fv, lower_bound=1)
    text("mesh", None, "Devices per axis: data=2,tensor=4 [one device].", flag_values=fv)
    several("layers", [], "MoE layers, numbered from 0: 0,3 [all].", flag_values=fv)
    define_step(fv)
    text("format", None, "How to write it [by the ending of --out].", flag_values=fv)
    text("out", None, "File to write; needed for parquet, npz and html.", flag_values=fv)
    text("compare", None, f"Share of routes that differ: {WAYS}.", flag_values=fv)
    if not parse_needed("routes", USAGE, fv, argv, ("workdir",)):
        return 0
    if fv.compare is not None:
        return _compare(fv)
    kind = trace_files.format_of(fv.format, fv.out, ("table", "html"))
    _check_flags(fv, kind)
    workdir = pathlib.Path(fv.workdir)
    layers = trace.check_layers(read_config(workdir).model, _numbers(fv.layers))
    check_step(workdir, fv.step)
    if kind == "table":
        layers = layers[:SHOWN_LAYERS] if not fv.layers else layers
    run, pieces = _pieces(fv, workdir, layers)
    header = trace.header(run.cfg, run.tokenizer, run.step, layers)
    texts = trace.token_texts(run.tokenizer)
    if kind == "table":
        _write_text(fv.out, [render([_table(run, pieces, texts, layers)])])
    elif kind == "html":
        number, more = trace_page.write_page(pathlib.Path(fv.out), header, pieces, texts)
        print(f"wrote {fv.out}: {number:,} tokens" + ", the first of a longer text" * more)
    elif kind == "jsonl" and not fv.out:
        first = header
        for records in pieces:
            _write_text(None, (f"{s}\n" for s in trace_files.json_lines(first, records, texts)))
            first = None
    else:
        number = trace_files.write(pathlib.Path(fv.out), kind, header, pieces, texts)
        print(f"wrote {fv.out}: {number:,} tokens, {len(layers)} MoE layers")
    return 0


def _compare(fv) -> int:
    """`--compare`: prints the table; --out writes its numbers as JSON."""
    from moejax.evals.evaluate import open_text

    others = [n for n in ("text", "prompt", "layers", "format", "mesh") if fv[n].value]
    if others:
        raise ConfigError(f"--compare and --{others[0]} cannot be used together\n{USAGE}")
    if fv.out and not pathlib.Path(fv.out).absolute().parent.is_dir():
        raise ConfigError(f"--out={fv.out}: there is no such folder")
    workdir = pathlib.Path(fv.workdir)
    cfg = read_config(workdir)
    check_routes(cfg.model, "--compare")
    ways = trace_agreement.ways_of(fv.compare, cfg)
    run, batches, _, layout = open_text(
        workdir,
        tuple(fv.sources),
        num_rows=_rows(fv, cfg),
        seq_len=fv.seq_len,
        batch_size=fv.batch_size,
        mesh=ways.mesh or None,
        step=fv.step,
    )
    progress = tqdm(batches, desc="compare", unit="batch", leave=False)
    found = trace_agreement.agreement(ways, run, progress, workdir, layout)
    title = f"{fv.workdir}, step {run.step}"
    print(render([trace_agreement.table(found, ways, title)]))
    if fv.out:
        pathlib.Path(fv.out).write_text(json.dumps(found.numbers(), indent=1) + "\n")
    return 0


def _rows(fv, cfg: ExperimentConfig) -> int | None:
    return None if fv.tokens is None else -(-fv.tokens // (fv.seq_len or cfg.data.seq_len))


def _check_flags(fv, kind: str) -> None:
    given = [n for n in ("text", "prompt") if fv[n].value is not None] + ["sources"] * bool(
        fv.sources
    )
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} cannot be used together\n{USAGE}")
    alone = [n for n in ("chat", "max_new") if fv[n].value and fv.prompt is None]
    if alone:
        raise ConfigError(f"--{alone[0]} needs --prompt\n{USAGE}")
    if kind not in ("table", "jsonl") and not fv.out:
        raise ConfigError(f"--format={kind} needs --out=FILE")
    if fv.out and not pathlib.Path(fv.out).absolute().parent.is_dir():
        raise ConfigError(f"--out={fv.out}: there is no such folder")
    rows = [n for n in ("seq_len", "batch_size", "mesh") if fv[n].value is not None]
    if rows and (fv.text is not None or fv.prompt is not None):
        raise ConfigError(f"--{rows[0]} is for --sources and held-out text: this text is one row")


def _numbers(given: list[str]) -> list[int]:
    try:
        return [int(i) for i in given]
    except ValueError as e:
        raise ConfigError(f"--layers={','.join(given)} must be numbers: 0,3") from e


def _pieces(fv, workdir: pathlib.Path, layers) -> tuple[OpenRun, Iterator[Records]]:
    """The run, and the records of the text that the flags name."""
    from moejax.evals.evaluate import open_text

    if fv.text is not None or fv.prompt is not None:
        run, batch = _one_text(fv, workdir)
        return run, _traced(run, [batch], layers, fv.tokens, None)
    run, batches, _, layout = open_text(
        workdir,
        tuple(fv.sources),
        num_rows=_rows(fv, read_config(workdir)),
        seq_len=fv.seq_len,
        batch_size=fv.batch_size,
        mesh=fv.mesh,
        step=fv.step,
    )
    return run, _traced(run, batches, layers, fv.tokens, layout)


def _traced(
    run: OpenRun, batches, layers, most: int | None, layout: Layout | None
) -> Iterator[Records]:
    progress = tqdm(batches, desc="routes", unit="batch", leave=False, delay=2)
    return trace.trace(run, progress, layers, most=most, layout=layout)


def _one_text(fv, workdir: pathlib.Path) -> tuple[OpenRun, dict]:
    """The run, and one row: the text, or the prompt and how the model goes on."""
    from moejax.evals.generate import round_up
    from moejax.evals.writer import Writer
    from moejax.runs.open import load_run

    if fv.prompt is not None:
        writer = Writer(workdir, max_new=fv.max_new, seed=fv.seed, step=fv.step)
        prompt = writer.encode([{"role": "user", "content": fv.prompt}] if fv.chat else fv.prompt)
        run, ids = writer.run, [*prompt, *writer.write_ids(prompt)]
    else:
        run = load_run(workdir, step=fv.step)
        ids = [run.tokenizer.bos_id, *run.tokenizer.encode(fv.text)]
    most = run.cfg.model.max_seq_len
    if len(ids) > most:
        raise ConfigError(
            f"the text has {len(ids)} tokens, and the model reads at most model.max_seq_len={most} at once; "
            "--sources=FILE cuts a longer one into rows"
        )
    return run, trace.one_row(ids, run.tokenizer.pad_id, min(round_up(len(ids)), most))


def _write_text(out: str | None, pieces: Iterable[str]) -> None:
    if out:
        pathlib.Path(out).write_text("".join(pieces), "utf-8")
    else:
        sys.stdout.writelines(pieces)


def _table(run: OpenRun, pieces: Iterator[Records], texts: list[str], layers) -> Table:
    """The first tokens, for a person."""
    rows, more = [], False
    for records in pieces:
        for i, token in enumerate(records.token_N.tolist()):
            if len(rows) == SHOWN_TOKENS:
                more = True
                break
            said = (
                plain(texts[token]).replace("\n", "⏎").replace(" ", "␣")
                if token < len(texts)
                else ""
            )
            cells = [_cell(records, i, at) for at in range(len(layers))]
            rows.append([str(len(rows)), repr(said)[1:-1] or str(token), *cells])
        if more:
            break
    title = f"{run.cfg.name}, step {run.step}: experts:weight of each token, and (margin)"
    every = run.cfg.model.num_moe_layers
    notes = [
        "margin: lowest of a token's experts minus highest of the others, in what the router ranks.",
        f"The first {SHOWN_TOKENS} tokens; --out=FILE.jsonl, .parquet or .npz has all of them."
        * more,
        f"{len(layers)} of {every} MoE layers; --layers=.. chooses others." * (len(layers) < every),
    ]
    heads = [f"layer {layer}" for layer in layers]
    return Table(title, ["", "token", *heads], rows, "\n".join(n for n in notes if n))


def _cell(records: Records, i: int, at: int) -> str:
    weights = records.weights_NLK[i, at] if records.weights_NLK is not None else ()
    pairs = [f"{e}:{w:.2f}" for e, w in zip(records.experts_NLK[i, at].tolist(), weights) if e >= 0]
    margin = "" if records.margin_NL is None else f" ({records.margin_NL[i, at]:.3f})"
    return " ".join(pairs) + margin

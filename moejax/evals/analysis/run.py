"""Analyses checkpoints of a run on a text and writes what it found: analysis.json and analysis.parquet."""

import json
import pathlib
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from moejax.config import ConfigError
from moejax.evals.analysis import collect, figures, pairs
from moejax.evals.analysis.table import Rows, summary
from moejax.evals.analysis.units import look_through
from moejax.evals.evaluate import open_text
from moejax.evals.routes import check_routes
from moejax.runs import folder
from moejax.runs.open import load_run, read_config
from moejax.runs.restore import check_step

FORMAT = 1


def analyze_run(
    workdir: pathlib.Path,
    sources: tuple[str, ...] = (),
    *,
    step: int | None = None,
    all_steps: bool = False,
    num_batches: int | None = None,
    layers: tuple[int, ...] = (),
    seq_len: int | None = None,
    batch_size: int | None = None,
) -> tuple[dict[str, Any], pa.Table]:
    """Every figure of one run.

    Args:
      workdir: the run's folder, trained or imported.
      sources: as `data.sources` of a config; () for the run's own held-out documents.
      step: the checkpoint; None: the newest.
      all_steps: every checkpoint that is there, and how far each has the routes of the last.
      num_batches: at most this many batches; 0: all of the text. None: of the run's own documents as much as
        training validates on, times 8, and all of any other source.
      layers: MoE layers, from 0, whose single figures are kept; (): all.
      seq_len, batch_size: replace the run's.

    Returns:
      What analysis.json holds, and the table of analysis.parquet.

    Raises ConfigError (DataError for the text) before any weights are read.
    """
    cfg = read_config(workdir)
    check_routes(cfg.model, f"--workdir={workdir}")
    steps = _steps(workdir, step, all_steps)
    chosen = _layers(layers, cfg.model.num_moe_layers)
    num_rows = None
    if num_batches is None and not sources:
        num_rows = 8 * cfg.train.eval_batches * (batch_size or cfg.data.batch_size)
    run, batches, domains, _ = open_text(
        workdir,
        sources,
        num_batches=num_batches,
        num_rows=num_rows,
        seq_len=seq_len,
        batch_size=batch_size,
        step=steps[-1],
    )
    per_token = cfg.model.num_moe_layers * cfg.model.moe.num_experts
    units = look_through(batches, len(domains), run.cfg.model.vocab_size, per_token)
    sizes = collect.sizes_of(run.cfg, units, seq_len or cfg.data.seq_len)
    programs = collect.programs(run.cfg, sizes)

    def bar(what: str):
        return tqdm(batches, desc=what, unit="batch", total=len(batches), leave=False)

    last = run.params, run.router_state
    tables, found, last_LE = [], {}, None
    for at in reversed(steps):
        model = last
        if at != steps[-1]:
            here = load_run(workdir, step=at)
            model = here.params, here.router_state
        rows = Rows(at, chosen, domains)
        seen = collect.collect(programs, *model, bar(f"step {at}"), units)
        scored = figures.add_figures(rows, seen, units)
        load_LE, tokens = seen.sums["load"].sum(axis=1), seen.sums["tokens"].sum()
        if last_LE is None:
            pieces = [p.decode("utf-8", "replace") for p in run.tokenizer.pieces]
            pieces += [""] * (run.cfg.model.vocab_size - len(pieces))
            found, last_LE = (figures.details(seen, units, chosen, scored, pieces), load_LE)
            found["text"] = {
                "sources": list(sources) or "held-out documents",
                "tokens": int(tokens),
                "batches": len(batches),
                "rows": dict(zip(domains, units.rows_d.tolist())),
            }
        else:
            sums = collect.saturation_sums(programs, model, last, bar(f"{at}, {steps[-1]}"), units)
            rows.add("saturation", pairs.saturation(*sums, load_LE, last_LE, tokens), "layers")
        tables.append(rows.table())
    table = pa.concat_tables(reversed(tables), promote_options="none").unify_dictionaries()
    return {
        "format": FORMAT,
        "name": run.cfg.name,
        "steps": steps,
        "layers": chosen,
        "experts": cfg.model.moe.num_experts,
        "routes_per_token": cfg.model.routes_per_token,
        "domains": list(domains),
        **found,
        "figures": summary(table),
    }, table


def write(found: dict[str, Any], table: pa.Table, where: pathlib.Path) -> None:
    """Write both files of an analysis into a folder, each whole or not at all."""
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    for name, save in {
        folder.ANALYSIS: lambda p: p.write_text(text, "utf-8"),
        folder.ANALYSIS_TABLE: lambda p: pq.write_table(table, p, compression="zstd"),
    }.items():
        part = where / f"{name}.part"
        save(part)
        part.replace(where / name)


def read(where: pathlib.Path) -> tuple[dict[str, Any], pa.Table] | None:
    """What `write` wrote into a folder; None if nothing is there. ConfigError if it cannot be read."""
    file, table = where / folder.ANALYSIS, where / folder.ANALYSIS_TABLE
    if not file.exists():
        return None
    again = f"moejax analyze --workdir={where} writes it again"
    try:
        found = json.loads(file.read_text("utf-8"))
        if found["format"] != FORMAT:
            raise ConfigError(f"{file} is of another version of moejax; {again}")
        return found, pq.read_table(table)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{file} and {table.name} cannot be read; {again}") from e


def _steps(workdir: pathlib.Path, step: int | None, all_steps: bool) -> list[int]:
    """The steps to look at, in their order. ConfigError if one is not there."""
    there = sorted(int(p.name) for p in folder.steps(workdir))
    if not there:
        raise ConfigError(f"{workdir} has no checkpoint yet; moejax train writes one")
    check_step(workdir, step)
    if step is not None:
        return [step]
    return there if all_steps else there[-1:]


def _layers(layers: tuple[int, ...], num_layers: int) -> list[int]:
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong:
        raise ConfigError(
            f"--layers: {wrong[0]} is no MoE layer of this model; they are 0 to {num_layers - 1}"
        )
    return sorted(set(layers)) or list(range(num_layers))

"""Evaluates a run: loss, perplexity and bits per byte of held-out text, overall and by domain."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tqdm import tqdm

from moejax import axes, user_cache
from moejax.config import ConfigError, DataConfig
from moejax.data import Corpus, Tokenizer, load_corpus, load_tokenizer, validation_batches
from moejax.evals.trace_read import open_trace
from moejax.evals.trace_replay import check_fits, replayed
from moejax.evals.validation import compile_eval, evaluate, size_text
from moejax.evals.writer import mesh_layout
from moejax.models.replay import most_routes
from moejax.runs import folder
from moejax.runs.open import OpenRun, load_run, read_config
from moejax.runs.restore import check_step
from moejax.sharding import Layout
from moejax.text import Table


def held_out(data: DataConfig, sources: tuple[str, ...]) -> tuple[DataConfig, Corpus]:
    """The data config and corpus to evaluate on: the run's own held-out documents, or every document
    of `sources`."""
    cache = user_cache.place("text")
    if not sources:
        return data, load_corpus(data, cache=cache)
    data = dataclasses.replace(data, sources=sources, weights=(), max_bytes=0)
    return data, load_corpus(data, only_validation=True, cache=cache)


class OpenText(NamedTuple):
    """A run, and the batches of text that it is to read.

    Attributes:
      run: opened, its arrays on the devices of `layout`.
      batches: see `moejax.data.validation_batches`.
      domains: their names.
      layout: the mesh and its table; None for one device.
    """

    run: OpenRun
    batches: Any
    domains: tuple[str, ...]
    layout: Layout | None


def open_text(
    workdir: pathlib.Path,
    sources: tuple[str, ...] = (),
    *,
    num_batches: int | None = None,
    num_rows: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    mesh: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    check: Callable[[Tokenizer, Iterable[dict]], None] | None = None,
) -> OpenText:
    """Opens a run and text for it, weights last. See `evaluate_run`; `num_rows` replaces `num_batches`, and
    `check` is called with the tokenizer and the batches before weights are read.

    Raises ConfigError (DataError for the text) for bad input.
    """
    cfg = read_config(workdir)
    check_step(workdir, step)
    data = dataclasses.replace(
        cfg.data, seq_len=seq_len or cfg.data.seq_len, batch_size=batch_size or cfg.data.batch_size
    )
    if data.seq_len > cfg.model.max_seq_len:
        raise ConfigError(
            f"seq_len={data.seq_len} exceeds the model's model.max_seq_len={cfg.model.max_seq_len}"
        )
    data, corpus = held_out(data, sources)
    layout = None if mesh is None else mesh_layout(cfg, mesh)
    ways = 1 if layout is None else layout.size(axes.BATCH)
    if data.batch_size % ways:
        raise ConfigError(
            f"batch_size={data.batch_size} does not divide evenly over the {ways} devices of the batch; "
            f"--batch_size={-(-data.batch_size // ways) * ways} would work"
        )
    tokenizer = load_tokenizer(cfg.data, None, workdir / folder.TOKENIZER)
    if num_rows is None and num_batches is None and not sources:
        tokens = cfg.train.eval_batches * cfg.data.batch_size * cfg.data.seq_len
        num_rows = -(-tokens // data.seq_len)
    elif num_rows is None:
        num_rows = (num_batches or 0) * data.batch_size or None
    batches = validation_batches(corpus, tokenizer, data, num_rows)
    if check is not None:
        check(tokenizer, batches)
    return OpenText(load_run(workdir, layout, step, dtype), batches, tuple(corpus.domains), layout)


def evaluate_run(
    workdir: pathlib.Path,
    sources: tuple[str, ...] = (),
    *,
    num_batches: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    mesh: str | None = None,
    step: int | None = None,
    dtype: str | None = None,
    replay: pathlib.Path | None = None,
) -> dict[str, float]:
    """Evaluates a checkpoint of a run, trained or imported.

    Args:
      workdir: the run's folder.
      sources: as `data.sources` of a config; () for the run's own held-out documents.
      num_batches: at most this many batches; 0 means all of the text. None means, for the run's own documents,
        the text that training validates on (whatever `seq_len` and `batch_size` are), and all of any other
        source.
      seq_len, batch_size: replace the run's. Documents longer than seq_len are cut into pieces that do not see
        each other, so a longer seq_len gives a lower loss.
      mesh: such as 'data=2,tensor=4'; None for one device.
      step: of the checkpoint; None: the newest.
      dtype: to compute in; None: the run's `compute.dtype`.
      replay: a trace of this text (`moejax routes`): tokens take its routes, and weigh them themselves.

    Returns:
      See `moejax.evals.validation.evaluate`. Raises ConfigError (DataError for the text) for bad input.
    """
    trace = None if replay is None else open_trace(replay)
    model = read_config(workdir).model
    if trace is not None:
        most_routes(model)  # refuses a model that cannot be told its routes

    def check(tokenizer: Tokenizer, batches: Iterable[dict]) -> None:
        if trace is not None:
            check_fits(trace, model, tokenizer)
            for _ in replayed(tqdm(batches, desc="trace", leave=False, delay=2), trace, model):
                pass

    run, batches, domains, layout = open_text(
        workdir,
        sources,
        num_batches=num_batches,
        seq_len=seq_len,
        batch_size=batch_size,
        mesh=mesh,
        step=step,
        dtype=dtype,
        check=check,
    )
    eval_fn = compile_eval(run.cfg, num_domains=len(domains), layout=layout)
    progress = tqdm(batches, desc="evaluate", unit="batch", total=len(batches), leave=False)
    text = progress if trace is None else replayed(progress, trace, model)
    return evaluate(eval_fn, run.params, run.router_state, text, domains, layout)[0]


def results_table(results: dict[str, float], title: str) -> Table:
    """One row for all text and one per domain; the title says how much text it was."""
    names = [n.removeprefix("loss/") for n in results if n.startswith("loss/")]
    body = []
    for name, end in [("all", ""), *((n, f"/{n}") for n in names)]:
        loss, bits, tokens = (results[k + end] for k in ("loss", "bits_per_byte", "tokens"))
        body.append(
            [name, f"{loss:.4f}", f"{math.exp(loss):,.2f}", f"{bits:.4f}", f"{tokens:,.0f}"]
        )
    header = ["domain", "nats per token", "perplexity", "bits per byte", "tokens"]
    return Table(f"{title}: {size_text(results)}", header, body)

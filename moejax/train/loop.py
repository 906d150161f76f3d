"""The training loop: reads data, steps, logs, evaluates, saves. All side effects of training are here."""

import contextlib
import dataclasses
import pathlib
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from moejax import user_cache
from moejax.config import ConfigError, ExperimentConfig
from moejax.config_checks import training_doubts
from moejax.cost.receipt import RunPlan, model_flops_per_token, plan_run
from moejax.data import (
    Corpus,
    Tokenizer,
    load_corpus,
    load_tokenizer,
    train_iterator,
    validation_batches,
)
from moejax.data.vocabulary import with_vocabulary
from moejax.evals.validation import compile_eval, evaluate, size_text
from moejax.mesh import check_layout, mesh_sizes
from moejax.moe.stats import LOGIT_EDGES
from moejax.params import count
from moejax.runs import folder, lock, provenance
from moejax.runs.checkpoint import Checkpoints
from moejax.sharding import Layout, make_layout, place_rows, rows_here
from moejax.train import processes
from moejax.train.base import Base, check_apart, fingerprint, open_base
from moejax.train.metrics import Log, Meter, scalars
from moejax.train.optimizer import optimizer_of, split_trained
from moejax.train.profile import Profile
from moejax.train.prolong import check_schedule
from moejax.train.show import Show
from moejax.train.signals import StopRequest
from moejax.train.state import (
    TrainState,
    create_state,
    restore_state,
    save_state,
    state_of_model,
    state_shardings,
)
from moejax.train.step import compile_step
from moejax.train.writers import OpenWriter


class Diverged(RuntimeError):
    """Too many steps in a row had a NaN or infinite loss or gradient."""


@dataclasses.dataclass
class Session:
    """Everything the loop uses besides the training state."""

    cfg: ExperimentConfig
    layout: Layout | None
    domains: tuple[str, ...]
    data: Any  # grain's iterator over this process's rows
    held_out: list[dict]
    checkpoints: Checkpoints
    plan: RunPlan | None  # in process 0
    base: Base | None  # what a run that has saved nothing yet begins from
    say: Callable[[str], None]
    log: Any = None  # the `Log`, once it is known at which step it begins
    done: int = 0
    profile: tuple[int, int] | None = None  # first and last step to trace
    writers: Sequence[OpenWriter] = ()

    @property
    def tokens_per_step(self) -> int:
        return self.cfg.data.batch_size * self.cfg.data.seq_len


def train(
    cfg: ExperimentConfig,
    workdir: pathlib.Path,
    *,
    force: bool = False,
    profile: tuple[int, int] | None = None,
    writers: Sequence[OpenWriter] = (),
) -> dict:
    """Run or resume an experiment, on all devices of its mesh. Returns the last validation metrics.

    With several processes (see `processes.start`) each of them calls this. Only process 0 prints and logs, and
    `workdir` must be on a file system that all of them share. `profile`: the first and last step to trace.
    `writers`: further places for what is measured, see `moejax.train.writers`.

    Raises ConfigError or DataError for bad input before anything is computed, and Diverged after
    `train.max_bad_steps` non-finite steps in a row; the last good checkpoint stays intact. Bad input is also a
    plan that needs more memory than there is, unless `force`.
    """
    devices = check_here(cfg)
    folder.check_writable(workdir)
    base, plan = None, None
    with processes.first_goes_first():
        if cfg.train.init_from:
            check_apart(cfg, workdir)
            if not folder.steps(workdir):  # else it goes on, and the base may be gone
                cfg, base = open_base(cfg, workdir)
    corpus = load_corpus(cfg.data, cache=user_cache.place("text"))
    with contextlib.ExitStack() as held:
        with processes.first_goes_first():
            # Check everything before writing anything, so that a refused command does not damage another run.
            tokenizer = base.tokenizer if base else _tokenizer(cfg, corpus, workdir)
            cfg = with_vocabulary(cfg, tokenizer.vocab_size)
            folder.check_workdir(workdir, cfg)
            check_schedule(workdir, cfg)
            layout = make_layout(cfg, devices)
            if processes.is_first():
                plan = _plan(cfg, layout, force)
                held.enter_context(lock.writing(workdir))
                folder.check_corpus(workdir, corpus.manifest)
                files = base.files if base else None
                folder.claim_workdir(workdir, cfg, tokenizer, corpus.manifest, files)
        for doubt in training_doubts(cfg):
            processes.say(f"warning: {doubt}")
        index, parts = rows_here(layout, cfg.data.batch_size, cfg.data.seq_len)
        most = cfg.train.eval_batches * cfg.data.batch_size
        session = Session(
            cfg=cfg,
            layout=layout,
            domains=corpus.domains,
            data=train_iterator(
                corpus,
                tokenizer,
                cfg.data,
                process_index=index,
                process_count=parts,
                say=processes.say,
            ),
            held_out=list(validation_batches(corpus, tokenizer, cfg.data, most)),
            checkpoints=Checkpoints(workdir, cfg),
            plan=plan,
            base=base,
            profile=profile if processes.is_first() else None,
            writers=writers,
            say=processes.say,
        )
        return _train(session)


def check_here(cfg: ExperimentConfig) -> list:
    """Check dtype, mesh and the optimiser's groups before the corpus is read: everything except whether the
    vocabulary divides. Returns the devices."""
    devices = processes.ordered_devices()
    if cfg.compute.dtype == "float64" and not jax.config.jax_enable_x64:  # pyright: ignore
        raise ConfigError("compute.dtype='float64' needs JAX_ENABLE_X64=1 in the environment")
    mesh = mesh_sizes(cfg.mesh, len(devices))
    check_layout(cfg, mesh, devices[0].platform, vocabulary=False)
    processes.check_devices(mesh.devices)
    optimizer_of(cfg)
    return devices


def _train(s: Session) -> dict:
    restored = restore_state(s.checkpoints, s.layout)
    key = jax.random.key(s.cfg.train.seed)
    begin = 0  # of a run that has saved nothing, all that it wrote is written again
    origin = {}
    if restored is not None:
        state, data_state = restored
        s.data.set_state(data_state)
        begin = int(state.step) + 1
        s.say(f"resuming {s.checkpoints.workdir} at step {int(state.step)}")
    elif s.base is not None:
        model = s.base.load(s.layout)
        origin = {"base": s.base.name, "base_sha256": fingerprint(*model)}
        state = state_of_model(s.cfg, *model, s.layout)
        del model
        s.say(f"beginning from {s.base.name}")
    else:
        state = create_state(s.cfg, key, s.layout)
    mesh = "" if s.layout is None else f", mesh {_mesh_text(s.layout)}"
    frozen = count(split_trained(state.params, s.cfg)[1])
    left = f" ({frozen:,} frozen)" if frozen else ""
    s.say(
        f"{s.cfg.name}: {count(state.params):,} parameters{left}, domains {', '.join(s.domains)}, "
        f"{s.tokens_per_step:,} tokens per step{mesh}"
    )
    if s.plan is not None:
        s.say(s.plan.headline())
    if int(state.step) >= s.cfg.train.steps:
        s.say(
            f"the run is finished at step {int(state.step)}; increase train.steps to train longer"
        )
        eval_fn = compile_eval(s.cfg, num_domains=len(s.domains), layout=s.layout)
        return _evaluate(s, eval_fn, state)[0]
    with _logged(s, begin, int(state.step), origin), StopRequest() as stop:
        return _run(s, state, key, stop)


@contextlib.contextmanager
def _logged(s: Session, begin: int, step: int, origin: dict):
    """Open the log, write down where its numbers come from, and close everything, however the body ends."""
    workdir, first = s.checkpoints.workdir, processes.is_first()
    s.log, s.done = Log(workdir, begin, s.cfg, s.writers, write=first), step
    started, why = time.monotonic(), None
    if first:
        provenance.start(workdir, step, origin)
    try:
        yield
        s.checkpoints.close()
        why = "finished" if s.done >= s.cfg.train.steps else "stopped"
    except BaseException as e:
        why = type(e).__name__
        if jax.process_count() == 1:  # else it would wait for the others
            with contextlib.suppress(folder.SaveError):
                s.checkpoints.close()
        raise
    finally:
        s.log.close()
        if first:
            with contextlib.suppress(folder.SaveError):
                provenance.end(workdir, s.done, time.monotonic() - started, str(why))


def _run(s: Session, state: TrainState, key: jax.Array, stop: StopRequest) -> dict:
    train_cfg, shardings = s.cfg.train, None
    if s.layout is not None:
        shardings = state_shardings(s.cfg, s.layout)
    options = {"num_domains": len(s.domains), "layout": s.layout}
    step_fn = compile_step(s.cfg, seed_key=key, shardings=shardings, **options)
    eval_fn = compile_eval(s.cfg, **options)
    results: dict = {}
    meter = Meter()
    first = int(state.step)
    show = Show(s.cfg.name, first, train_cfg.steps, on=processes.is_first())
    profile = Profile(s.profile, s.checkpoints.workdir, show.say)
    if s.profile is not None and s.profile[0] <= first:
        s.say(f"no profile: the run goes on after step {first}")
    bad_before = None
    if first == 0 and s.base is not None:
        _log_evaluation(s, 0, eval_fn, state, show)
        meter.restart()
    for done in range(first + 1, train_cfg.steps + 1):
        batch = place_rows(next(s.data), s.layout, s.cfg.data.batch_size)
        profile.before(done, step_fn, state, batch)
        state, metrics = step_fn(state, batch)
        profile.after(done, metrics)
        s.done = done
        if bad_before is not None:
            _check_finite(s, done - 1, int(bad_before))  # while the device computes this step
        bad_before = metrics["bad_in_a_row"]
        meter.count(s.tokens_per_step)
        asked = stop.now(done)  # asked once: a signal during this step stops the next one
        last = done == train_cfg.steps or asked
        if done % train_cfg.log_every == 0 or last:
            show.values(done, *_log_step(s, done, jax.device_get(metrics), meter))
        show.step(done)
        if done % train_cfg.eval_every == 0 or last:
            results = _log_evaluation(s, done, eval_fn, state, show)
            meter.restart()
        if done % train_cfg.checkpoint_every == 0 or last:
            save_state(s.checkpoints, state, s.data.get_state())
            meter.restart()
        if asked:
            break
    profile.stop()
    show.close()
    _finish(s, int(state.step), meter)
    return results


def _check_finite(s: Session, done: int, bad_in_a_row: int) -> None:
    """Raises Diverged if too many steps in a row were skipped."""
    if bad_in_a_row >= s.cfg.train.max_bad_steps:
        left = s.checkpoints.forsake(done - bad_in_a_row)
        now = (
            "no checkpoint is left" if left is None else f"step {left} is now the newest checkpoint"
        )
        raise Diverged(
            f"{bad_in_a_row} steps in a row had a NaN or infinite loss, gradient or update, and were left "
            f"out; stopped at step {done}. {now.capitalize()} in {s.checkpoints.folder}: those with the "
            f"parameters of these steps were moved to {folder.DAMAGED}/. See {s.log.path} for the steps "
            "before. To go on at a lower rate: --config.optimizer.learning_rate=LOWER "
            "--config.train.rate_may_jump=true"
        )


def _log_step(s: Session, done: int, values: dict, meter: Meter) -> tuple[float, float]:
    """Write the metrics of a step, and return its loss and tokens per second. Raises Diverged."""
    _check_finite(s, done, values["bad_in_a_row"])
    values["tokens_per_second"] = speed = meter.read()
    values["flops_per_second"] = speed * model_flops_per_token(s.cfg)
    s.log.write(done, "train", scalars(values, s.domains))
    if "stats/moe_blocks/load" in values:
        s.log.write(done, "load", {"load_LE": values["stats/moe_blocks/load"].tolist()})
        own = re.compile("(stats|state)/moe_blocks/(?!load$)")
        arrays = {k: v.tolist() for k, v in values.items() if own.match(k)}
        s.log.write(done, "router", {k.replace("/moe_blocks", ""): v for k, v in arrays.items()})
    return float(values["cross_entropy"]), speed


def _log_evaluation(s: Session, done: int, eval_fn, state: TrainState, show: Show) -> dict:
    results, routed = _evaluate(s, eval_fn, state)
    s.log.write(done, "validation", results)
    if routed:
        edges = {"logit_edges": LOGIT_EDGES} if "logits_LN" in routed else {}
        counts = {name: a.tolist() for name, a in routed.items()}
        s.log.write(done, "routing", {"domains": list(s.domains), **counts, **edges})
    when = f"step {done}" if done else "before training"
    show.say(f"{when}: validation loss {results['loss']:.4f} ({size_text(results)})")
    return results


def _evaluate(s: Session, eval_fn, state: TrainState):
    return evaluate(
        eval_fn,
        state.params,
        state.router_state,
        s.held_out,
        s.domains,
        s.layout,
    )


def _finish(s: Session, done: int, meter: Meter) -> None:
    """Wait until the last step is saved, then print the receipt."""
    s.checkpoints.wait()
    if done < s.cfg.train.steps:
        s.say(
            f"stopped on request at step {done}, which is saved; the same command continues from there"
        )
    speed = meter.typical()
    if speed is not None and s.plan is not None:
        planned = s.plan.step.tokens_per_second
        s.log.write(
            done, "receipt", {"tokens_per_second": speed, "planned_tokens_per_second": planned}
        )
        s.say(s.plan.receipt(speed))


def _plan(cfg: ExperimentConfig, layout: Layout | None, force: bool) -> RunPlan:
    """The plan of a run; ConfigError if it does not fit the devices, unless `force`."""
    plan = plan_run(cfg, layout)
    problem = plan.problem()
    if problem and not force:
        raise ConfigError(f"this run does not fit: {problem}. --force tries it all the same")
    return plan


def _tokenizer(cfg: ExperimentConfig, corpus: Corpus, workdir: pathlib.Path) -> Tokenizer:
    tokenizer = load_tokenizer(cfg.data, corpus, workdir / folder.TOKENIZER)
    if cfg.data.tokenizer == "bpe" and tokenizer.vocab_size < cfg.data.vocab_size:
        processes.say(
            f"this text gives only {tokenizer.vocab_size} tokens of data.vocab_size={cfg.data.vocab_size}"
        )
    return tokenizer


def _mesh_text(layout: Layout) -> str:
    return ", ".join(f"{a}={n}" for a, n in layout.mesh.shape.items() if n > 1)

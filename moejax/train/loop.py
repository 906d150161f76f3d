"""The training loop: the only place with side effects. Reads data, steps, logs, evaluates, saves."""

import dataclasses
import json
import pathlib
import signal
import time

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from moejax.config import ConfigError, ExperimentConfig
from moejax.data import load_corpus, load_tokenizer, train_iterator, validation_batches
from moejax.params import count
from moejax.sharding import make_layout
from moejax.train.checkpoint import Checkpoints, claim_workdir
from moejax.train.state import create_state
from moejax.train.step import compile_step, eval_step


class Diverged(RuntimeError):
    """Too many steps in a row were not finite."""


def with_vocabulary(cfg: ExperimentConfig, vocab_size: int) -> ExperimentConfig:
    """The config with the model's vocabulary taken from the tokenizer."""
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=vocab_size))


def train(cfg: ExperimentConfig, workdir: pathlib.Path) -> dict:
    """Run or resume an experiment. Returns the last validation metrics.

    Raises ConfigError or DataError before any compute for bad input, and Diverged after
    `train.max_bad_steps` non-finite steps in a row, with the last good checkpoint intact.
    """
    if make_layout(cfg) is not None:
        raise ConfigError("train runs on one device: set every mesh axis to 1")
    corpus = load_corpus(cfg.data)
    workdir.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(cfg.data, corpus, workdir)
    cfg = with_vocabulary(cfg, tokenizer.vocab_size)
    claim_workdir(workdir, cfg)
    (workdir / "corpus.json").write_text(json.dumps(corpus.manifest, indent=1))
    data = train_iterator(corpus, tokenizer, cfg.data)
    held_out = list(validation_batches(corpus, tokenizer, cfg.data, cfg.train.eval_batches))

    checkpoints = Checkpoints(workdir, cfg)
    restored = checkpoints.restore()
    key = jax.random.key(cfg.train.seed)
    if restored is None:
        state = create_state(cfg, key, None)
    else:
        state, data_state = restored
        if data_state is not None:
            data.set_state(data_state)
        print(f"resuming {workdir} at step {int(state.step)}")
    print(
        f"{cfg.name}: {count(state.params):,} parameters, domains {', '.join(corpus.domains)}, "
        f"{cfg.data.batch_size * cfg.data.seq_len:,} tokens per step"
    )
    try:
        return _run(
            cfg, state, data, held_out, tokenizer, corpus.domains, checkpoints, workdir, key
        )
    finally:
        checkpoints.close()


def _run(cfg, state, data, held_out, tokenizer, domains, checkpoints, workdir, key) -> dict:
    step_fn = compile_step(cfg, num_domains=len(domains), seed_key=key)
    eval_fn = jax.jit(lambda p, r, b: eval_step(p, r, b, cfg, num_domains=len(domains)))
    stop = _stop_on_signal()
    log = Log(workdir)
    results: dict = {}
    first = int(state.step)
    bar = tqdm(total=cfg.train.steps, initial=first, desc=cfg.name, unit="step")
    started, tokens = time.monotonic(), 0
    for step in range(first, cfg.train.steps):
        state, metrics = step_fn(state, next(data))
        tokens += cfg.data.batch_size * cfg.data.seq_len
        done = step + 1
        asked = stop["now"]  # read once: a signal during this step stops the next one
        last = done == cfg.train.steps or asked
        if done % cfg.train.log_every == 0 or last:
            values = jax.device_get(metrics)
            if values["bad_in_a_row"] >= cfg.train.max_bad_steps:
                raise Diverged(
                    f"{values['bad_in_a_row']} steps in a row had a NaN or infinite loss or gradient; "
                    f"stopped at step {done}. The last good checkpoint in {checkpoints.folder} is intact; "
                    f"see {log.path} for the steps before, and lower optimizer.learning_rate"
                )
            now = time.monotonic()
            values["tokens_per_second"] = tokens / (now - started)
            started, tokens = now, 0
            log.write(done, "train", scalars(values, domains))
            if "load/moe_blocks" in values:
                log.append(done, "load", {"load_LE": values["load/moe_blocks"].tolist()})
            bar.set_postfix(
                loss=f"{values['cross_entropy']:.3f}", tok_s=f"{values['tokens_per_second']:.0f}"
            )
        bar.update()
        if done % cfg.train.eval_every == 0 or last:
            results = evaluate(eval_fn, state, held_out, domains, tokenizer)
            log.write(done, "validation", results)
            tqdm.write(f"step {done}: validation loss {results['loss']:.4f}")
            started, tokens = time.monotonic(), 0
        if done % cfg.train.checkpoint_every == 0 or last:
            if int(state.bad_in_a_row) == 0:
                checkpoints.save(state, data.get_state())
            started, tokens = time.monotonic(), 0
        if asked:
            tqdm.write(
                f"stopped on request; saved step {done}, the same command goes on from there"
            )
            break
    bar.close()
    log.close()
    if first == cfg.train.steps:
        print(f"the run is finished at step {first}; raise train.steps to prolong it")
        results = evaluate(eval_fn, state, held_out, domains, tokenizer)
    return results


def evaluate(eval_fn, state, batches, domains, tokenizer) -> dict:
    """Loss (nats per token), perplexity and bits per byte over held-out batches, and loss per domain."""
    sums, num_bytes = None, 0
    for batch in batches:
        out = jax.device_get(eval_fn(state.params, state.router_state, batch))
        sums = out if sums is None else jax.tree.map(np.add, sums, out)
        num_bytes += int((tokenizer.token_bytes_V[batch["targets"]] * batch["loss_mask"]).sum())
    assert sums is not None, "validation_batches gave no batch"
    nll, targets = sums["domain_nll"], sums["domain_targets"]
    loss = float(nll.sum() / targets.sum())
    return {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "bits_per_byte": float(nll.sum() / np.log(2) / max(num_bytes, 1)),
        **{f"loss/{d}": float(nll[i] / targets[i]) for i, d in enumerate(domains) if targets[i]},
    }


def scalars(values: dict, domains) -> dict:
    """The scalar metrics of a step as floats, the loss of each domain among them."""
    out = {k: float(v) for k, v in values.items() if np.ndim(v) == 0}
    for i, d in enumerate(domains):
        if values["domain_targets"][i]:
            out[f"loss/{d}"] = float(values["domain_nll"][i] / values["domain_targets"][i])
    return out


class Log:
    """metrics.jsonl and TensorBoard."""

    def __init__(self, workdir: pathlib.Path):
        self.path = workdir / "metrics.jsonl"
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, kind: str, values: dict) -> None:
        for name, value in values.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)
        self.append(step, kind, values)

    def append(self, step: int, kind: str, values: dict) -> None:
        self.file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()
        self.board.close()


def _stop_on_signal() -> dict:
    """Ctrl-C and SIGTERM set `now`; the loop then saves and leaves. A second Ctrl-C interrupts."""
    stop = {"now": False}

    def handle(number, frame):
        del frame
        stop["now"] = True
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return stop

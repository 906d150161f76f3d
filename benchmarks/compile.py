"""Compile time of the training step, 4 against 32 scanned layers.

    python -m benchmarks.compile
    python -m benchmarks.compile --tiny

Tracing, lowering and compiling `train_step` without any cache, in turns, at the sizes of `benchmarks.step`
(`--tiny`: its toy sizes). Nothing is allocated or run.
"""

import time

import jax
import numpy as np
from absl import app, flags

from benchmarks import common, step
from moejax.config import ExperimentConfig
from moejax.train.state import abstract_state
from moejax.train.step import compile_step

LAYERS = (4, 32)


def compile_seconds(cfg: ExperimentConfig) -> tuple[float, float]:
    """Wall clock and processor seconds of tracing, lowering and compiling the step of a config."""
    shape = (cfg.data.batch_size, cfg.data.seq_len)
    fields = ("tokens", "targets", "segment_ids", "positions", "loss_mask", "domain")
    batch = {f: jax.ShapeDtypeStruct(shape, np.int32) for f in fields}
    jax.clear_caches()
    wall, cpu = time.perf_counter(), time.process_time()
    compile_step(cfg).lower(abstract_state(cfg), batch).compile()
    return time.perf_counter() - wall, time.process_time() - cpu


def run(sizes: dict, rows: int, length: int, repeats: int) -> list[dict]:
    def timer(layers):
        cfg = step.experiment(dict(sizes, num_layers=layers), rows, length, scan_layers=True)
        return common.Timer(lambda: compile_seconds(cfg))

    few, many = LAYERS
    t = common.side_by_side({str(n): timer(n) for n in LAYERS}, repeats)
    ratio = t[str(many)].wall / t[str(few)].wall
    detail = (
        f"{t[str(many)].wall:.1f} / {t[str(few)].wall:.1f} s (CPU time x "
        f"{t[str(many)].cpu / t[str(few)].cpu:.2f})"
    )
    what = f"step: compile time, {many} layers / {few} (scanned)"
    return [common.row(what, ratio, 1.3, detail)]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    common.select_platform("cpu")
    toy = (step.TOY, step.TOY_ROWS, step.TOY_LENGTH)
    case = toy if step.TINY.value else (step.SIZES, step.ROWS, step.LENGTH)
    rows = run(*case, flags.FLAGS.compile_repeats)
    common.report("Compilation", rows, step.OUTPUT.value)


if __name__ == "__main__":
    flags.DEFINE_integer("compile_repeats", 2, "Timed compilations of each.")
    app.run(main)

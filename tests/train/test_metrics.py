"""The log survives a crash in the middle of a line, TensorBoard reads the same; speed is measured without
pauses."""

import json
import math
import struct
import sys
import time
from typing import ClassVar

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from moejax.config import ConfigError, ExperimentConfig, ModelConfig, OptimizerConfig
from moejax.runs.metrics import read_metrics
from moejax.train.metrics import Log, Meter
from moejax.train.writers import TensorBoard, hyper_parameters, weights_and_biases


def rows_of(log):
    """Every line as strict JSON: NaN is none."""
    lines = log.path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    return [json.loads(x, parse_constant=lambda c: pytest.fail(f"{c} is no JSON")) for x in lines]


def test_every_step_is_there_once_after_any_number_of_kills(tmp_path):
    for begin in (0, 1, 2, 2, 3):  # where each part of the run goes on
        log = Log(tmp_path, begin)
        for step in range(begin, 5):
            log.write(step, "train", {"loss": float(begin)})
        log.write(5, "validation", {"loss": 0.5})
        with log.path.open("a") as f:
            f.write('{"step": 2, "ki')  # killed here
        log.close()
    log = Log(tmp_path, 4)
    log.close()
    assert [(r["step"], r["loss"]) for r in rows_of(log)] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    before = log.path.stat()
    Log(tmp_path, 4).close()  # nothing to cut: the file is left as it is
    assert log.path.stat().st_ino == before.st_ino
    assert not list(tmp_path.glob("*.part"))


def test_what_is_not_finite_is_null_and_read_as_nan(tmp_path):
    log = Log(tmp_path, 0)
    log.write(1, "train", {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.5})
    log.write(1, "load", {"load_LE": [[1.0, -float("inf")]]})
    log.write(1, "validation", {"loss": 2.0})
    log.close()
    assert rows_of(log)[0] == {
        "step": 1,
        "kind": "train",
        "loss": None,
        "grad_norm": None,
        "lr": 0.5,
    }
    read = read_metrics(tmp_path)
    assert math.isnan(read["train"][1]["loss"]) and read["train"][1]["lr"] == 0.5
    assert np.isnan(read["load"][1]["load_LE"]).tolist() == [[False, True]]


def events(folder):
    """The events of a folder's one file: TFRecords of length (8 bytes), its CRC (4), data, its CRC (4)."""
    (path,) = folder.iterdir()
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4


def summaries(folder):
    return [(v, e.step) for e in events(folder / "tensorboard") for v in e.summary.value]


def test_tensorboard_holds_the_scalars_of_the_log_under_a_few_headings(tmp_path):
    log = Log(tmp_path, 0)
    log.write(3, "train", {"loss": 2.5, "loss/code": 1.75, "learning_rate": 1e-3, "max_vio": 2.0})
    log.write(6, "train", {"loss": 2.25, "tokens_per_second": 10.0, "new": 1})
    log.write(6, "validation", {"loss": 2.375})
    log.write(6, "receipt", {"tokens_per_second": 9.0})  # one number of the whole run: no chart
    log.close()
    found = {(v.tag, step): v.simple_value for v, step in summaries(tmp_path)}
    assert found == pytest.approx(
        {
            ("loss/train/loss", 3): 2.5,
            ("domains/train/loss/code", 3): 1.75,
            ("optimiser/train/learning_rate", 3): 1e-3,
            ("balance/train/max_vio", 3): 2.0,
            ("loss/train/loss", 6): 2.25,
            ("speed/train/tokens_per_second", 6): 10.0,
            ("other/train/new", 6): 1.0,
            ("loss/validation/loss", 6): 2.375,
        }
    )


def test_tensorboard_has_a_histogram_of_the_experts_of_each_layer(tmp_path):
    log = Log(tmp_path, 0)
    log.write(1, "load", {"load_LE": [[1.0, 2.0, 9.0], [4.0, 4.0, 4.0]]})
    log.write(1, "router", {"state/expert_bias": [[0.1, -0.1]], "stats/dropped": [3.0]})
    # The report draws the routes.
    logits = {"logits_LN": [[1, 0, 5, 2, 3]], "logit_edges": [-2.0, -1.0, 1.0, 2.0]}
    log.write(1, "routing", {"domains": ["code"], "load_dLE": [[[1.0]]], **logits})
    log.close()
    found = {v.tag: v for v, _ in summaries(tmp_path)}
    assert set(found) == {
        *("experts/load/layer_0", "experts/load/layer_1"),
        *("experts/expert_bias/layer_0", "experts/dropped/layer_0", "experts/logits/layer_0"),
    }
    logits = found["experts/logits/layer_0"].histo
    # The outermost bins end at 2 * 2 / 1.
    assert (logits.min, logits.max, logits.num) == (-4.0, 4.0, 11.0)
    assert list(logits.bucket) == [1.0, 0.0, 5.0, 2.0, 3.0]
    assert list(logits.bucket_limit) == [-2.0, -1.0, 1.0, 2.0, 4.0]
    assert logits.sum == -3 + 3 + 9 and logits.sum_squares == 9 + 2 * 2.25 + 3 * 9
    load = found["experts/load/layer_0"].histo
    assert (load.min, load.max, load.num, load.sum) == (1.0, 9.0, 3.0, 12.0)
    assert found["experts/dropped/layer_0"].simple_value == 3.0


def test_tensorboard_shows_the_config_and_samples(tmp_path):
    cfg = ExperimentConfig(optimizer=OptimizerConfig(learning_rate=0.25))
    log = Log(tmp_path, 0, cfg)
    log.close()
    texts = {v.tag: v.tensor.string_val for v, _ in summaries(tmp_path)}
    assert b'"learning_rate": 0.25' in texts["config/text_summary"][0]
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(texts)
    assert hyper_parameters(cfg) == {"optimizer.learning_rate": 0.25}  # the rest are defaults
    board = TensorBoard(tmp_path, None, 9)
    board.sample(8, "def ", "f():\n  <b>")
    board.close()
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2 and any(b"def  | f():" in f.read_bytes() for f in files)


class Listening:
    """A writer of somebody else."""

    def __init__(self, *how, fails=()):
        self.how, self.fails, self.rows, self.closed = how, fails, [], False

    def write(self, step, kind, values):
        if step in self.fails:
            raise RuntimeError("the network is down")
        self.rows.append((step, kind, values))

    def close(self):
        self.closed = True


def test_another_writer_gets_every_row(tmp_path):
    cfg, made = ExperimentConfig(), []
    log = Log(tmp_path, 3, cfg, [lambda *how: made.append(Listening(*how)) or made[0]])
    log.write(3, "train", {"loss": 1.0})
    log.write(4, "load", {"load_LE": [[1.0]]})
    log.close()
    [writer] = made
    assert writer.how == (tmp_path, cfg, 3) and writer.closed
    assert writer.rows == [(3, "train", {"loss": 1.0}), (4, "load", {"load_LE": [[1.0]]})]


def test_a_writer_that_fails_costs_only_its_own_rows(tmp_path):
    writer = Listening(fails=(2,))
    with pytest.warns(UserWarning, match="a writer failed .* ZeroDivisionError"):
        log = Log(tmp_path, 0, None, [lambda *how: writer, lambda *how: 1 / 0])
    with pytest.warns(UserWarning, match="Listening failed .* RuntimeError: the network is down"):
        for step in (1, 2, 3):
            log.write(step, "train", {"loss": 1.0})
    log.close()
    assert [step for step, *_ in writer.rows] == [1]
    assert [r["step"] for r in rows_of(log)] == [1, 2, 3]


def test_weights_and_biases_has_the_same_charts(tmp_path, monkeypatch):
    class Wandb:
        """What is used of the library."""

        @staticmethod
        def Histogram(values=None, np_histogram=None):
            given = values if np_histogram is None else np.concatenate(np_histogram)
            return "histogram", list(given)

        runs: ClassVar = []

        @classmethod
        def init(cls, **how):
            cls.runs.append(how)
            return cls()

        def define_metric(self, *how, **more):
            assert (how, more) == (("*",), {"step_metric": "step"})

        def log(self, values):
            self.runs[-1].setdefault("rows", []).append(values)

        def finish(self):
            self.runs[-1]["finished"] = True

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    for begin in (0, 2):  # it goes on: the same run there
        log = Log(tmp_path, begin, ExperimentConfig(name="a"), [weights_and_biases("mine")])
        log.write(begin, "train", {"loss": 1.0, "bad": float("nan")})
        log.write(begin, "load", {"load_LE": [[1.0, 3.0]]})
        log.write(begin, "receipt", {"tokens_per_second": 1.0})
        log.write(
            begin,
            "routing",
            {"logits_LN": [[3, 1, 2, 0, 4]], "logit_edges": [-2.0, -1.0, 1.0, 2.0]},
        )
        log.close()
    first, second = Wandb.runs
    assert first["id"] == second["id"] and first["finished"] and first["name"] == "a"
    assert (first["project"], first["resume"]) == ("mine", "allow")
    assert first["config"]["model"]["d_model"] == ModelConfig().d_model
    assert first["rows"][0]["loss/train/loss"] == 1.0 and first["rows"][0]["step"] == 0
    assert first["rows"][1] == {"step": 0, "experts/load/layer_0": ("histogram", [1.0, 3.0])}
    # Counts, then the edges of their bins.
    logits = ("histogram", [3, 1, 2, 0, 4, -4.0, -2.0, -1.0, 1.0, 2.0, 4.0])
    assert first["rows"][2] == {"step": 0, "experts/logits/layer_0": logits}
    assert len(first["rows"]) == 3


def test_weights_and_biases_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'moejax\[wandb\]'"):
        weights_and_biases("mine")


def test_only_process_zero_writes(tmp_path):
    log = Log(tmp_path, 0, write=False)
    log.write(1, "train", {"loss": 0.5})
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    meter = Meter()
    assert meter.typical() is None

    def work(seconds, tokens):
        now[0] += seconds
        meter.count(tokens)

    work(60.0, 100)  # compiles
    meter.read()
    work(1.0, 100)
    assert meter.read() == 100
    now[0] += 30.0  # an evaluation
    meter.restart()
    for tokens in (200, 300):
        work(1.0, tokens)
        meter.read()
    assert meter.typical() == 200  # of 100, 200 and 300; the first reading is left out

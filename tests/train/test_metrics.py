"""The log survives a crash in the middle of a line, TensorBoard reads the same; speed is measured without
pauses."""

import json
import math
import struct
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from moejax.runs.metrics import read_metrics
from moejax.train.metrics import Log, Meter


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
    log.append(1, "load", {"load_LE": [[1.0, -float("inf")]]})
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


def test_tensorboard_holds_the_scalars_of_the_log(tmp_path):
    log = Log(tmp_path, 0)
    log.write(3, "train", {"loss": 2.5, "loss/code": 1.75, "learning_rate": 1e-3})
    log.append(3, "load", {"load": [[1, 2]]})  # no scalar: in the file alone
    log.write(6, "train", {"loss": 2.25})
    log.write(6, "validation", {"loss": 2.375})
    log.close()
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    want = {
        (f"{row['kind']}/{name}", row["step"]): value
        for row in rows
        for name, value in row.items()
        if isinstance(value, float)
    }
    assert len(rows) == 4 and len(want) == 5
    found = [
        (v.tag, e.step, v.simple_value)
        for e in events(tmp_path / "tensorboard")
        for v in e.summary.value
    ]
    assert len(found) == 5
    assert {(tag, step): value for tag, step, value in found} == pytest.approx(want)


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

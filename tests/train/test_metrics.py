"""The log survives a crash in the middle of a line, TensorBoard reads the same; speed is measured without
pauses."""

import json
import struct
import time

import pytest
from tensorboardX.proto.event_pb2 import Event

from moejax.train.metrics import Log, Meter


def test_a_line_cut_off_by_a_crash_spoils_no_other(tmp_path):
    for step in (1, 2):
        log = Log(tmp_path)
        log.write(step, "train", {"loss": 0.5})
        log.close()
        with log.path.open("a") as f:
            f.write('{"step": 9, "ki')  # killed here
    lines = log.path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if line.endswith("}")] == [1, 2]
    assert sum(not line.endswith("}") for line in lines) == 2


def events(folder):
    """The events of a folder's one file: TFRecords of length (8 bytes), its CRC (4), data, its CRC (4)."""
    (path,) = folder.iterdir()
    data, at = path.read_bytes(), 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        yield Event.FromString(data[at + 12 : at + 12 + length])
        at += 12 + length + 4


def test_tensorboard_holds_the_scalars_of_the_log(tmp_path):
    log = Log(tmp_path)
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
    log = Log(tmp_path, write=False)
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

"""The log survives a crash in the middle of a line; speed is measured without pauses."""

import json
import time

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

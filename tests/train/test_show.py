"""How far a run is: a bar on a terminal, lines without one."""

import sys

from moejax.train import show
from moejax.train.show import Show


def test_lines_without_a_terminal(monkeypatch, capsys):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(show.time, "monotonic", lambda: float(next(clock)))
    s = Show("x", 10, 16)
    for done in range(11, 17):
        s.values(done, 2.5, 1234.5)
        s.step(done)
    s.say("step 16: validation loss 2.0000")
    s.close()
    out, err = capsys.readouterr()
    # A reading every 6 seconds: the first line, then one after at least 10 s, and the last step.
    assert out.splitlines() == [
        "step 10/16: compiling",
        "step 11/16: loss 2.500, 1,234 tokens/s, 30 s left",
        "step 13/16: loss 2.500, 1,234 tokens/s, 18 s left",
        "step 15/16: loss 2.500, 1,234 tokens/s, 6 s left",
        "step 16/16: loss 2.500, 1,234 tokens/s",
        "step 16: validation loss 2.0000",
    ]
    assert err == ""


def test_a_bar_on_a_terminal_says_that_it_compiles(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    s = Show("quick", 0, 4)
    s.values(1, 2.5, 1234.0)
    for done in (1, 2, 3, 4):
        s.step(done)
    s.close()
    out, err = capsys.readouterr()
    assert "compiling" in err and "loss=2.500, tok_s=1234" in err and "4/4" in err
    assert out == ""


def test_other_processes_show_nothing(capsys):
    s = Show("x", 0, 4, on=False)
    s.values(4, 2.5, 1.0)
    s.step(4)
    s.say("text")
    s.close()
    assert capsys.readouterr() == ("", "")

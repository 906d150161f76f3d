"""How a command ends: its exit status and what it says."""

import pytest

from moejax.__main__ import main
from moejax.commands import report
from moejax.config import ConfigError


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ConfigError("too wide"), 2, "moejax report: too wide"),
        (PermissionError(13, "Permission denied", "runs/x.html"), 2, "runs/x.html: Permission denied"),
        (KeyboardInterrupt(), 130, "moejax report: interrupted"),
    ],
)  # fmt: skip
def test_how_a_command_ends(monkeypatch, capsys, error, code, text):
    def fail(argv):
        raise error

    monkeypatch.setattr(report, "main", fail)
    assert main(["report"]) == code
    assert text in capsys.readouterr().err


def test_a_bug_is_not_taken_for_a_users_mistake(monkeypatch):
    def fail(argv):
        raise OSError("without a file")

    monkeypatch.setattr(report, "main", fail)
    with pytest.raises(OSError, match="without a file"):
        main(["report"])

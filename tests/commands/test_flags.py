"""Flags of a command: every mistake is a ConfigError that names it and what would work."""

import sys

import pytest
from absl import flags

from moejax.__main__ import main
from moejax.commands import flags as command_flags
from moejax.commands import report
from moejax.config import ConfigError

# ml_collections loads a config file in a way Python calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

USAGE = "usage: moejax try --size=3"
GOOD = """\
from moejax.config import ConfigError, ExperimentConfig, to_config_dict

def get_config(variant=""):
    if variant:
        raise ConfigError(f"no variant {variant!r}; leave it out")
    return to_config_dict(ExperimentConfig(name="tiny"))
"""


def parse(*argv):
    fv = flags.FlagValues()
    command_flags.define_config(fv, list(argv), "An experiment.")
    flags.DEFINE_integer("size", 3, "How many.", flag_values=fv)
    return command_flags.parse("try", USAGE, fv, list(argv)), fv


def test_arguments_and_overrides(tmp_path):
    (tmp_path / "x.py").write_text(GOOD)
    rest, fv = parse("a", f"--config={tmp_path}/x.py", "--config.model.d_model=64", "b")
    assert rest == ["a", "b"] and fv.size == 3
    cfg = command_flags.experiment_of(fv)
    assert cfg.name == "tiny" and cfg.model.d_model == 64


def test_help_lists_the_commands_own_flags(capsys):
    rest, _ = parse("--help")
    out = capsys.readouterr().out
    assert rest is None and out.startswith(USAGE)
    assert "How many. [3]" in out and "flagfile" not in out


@pytest.mark.parametrize(
    "flag, text",
    [
        ("--siz=2", "size"),
        ("--size=two", "'two'"),
        ("--config={0}/x.py --config.model.d_modl=2", "unknown key 'd_modl': Did you mean \"d_model\""),
        ("--config={0}/x.py --config.model.d_model=two", "'two'"),
        ("--config={0}/x.py:big", "no variant 'big'; leave it out"),
        ("--config={0}/empty.py", "the file has no get_config()"),
        ("--config={0}/broken.py", "broken.py, line 2: ModuleNotFoundError"),
        ("--config={0}/none.py.py", "get_config() of the file returned nothing"),
        ("--config={0}/text.py", "text.py is not Python, line 1"),
        ("--config={0}/none.py", "No such file or directory"),
        ("--config={0}", "Is a directory"),
    ],
)  # fmt: skip
def test_mistakes(flag, text, tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("config_")]:  # of files loaded before
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "x.py").write_text(GOOD)
    (tmp_path / "text.py").write_text("A page of text.\n")
    (tmp_path / "empty.py").write_text("x = 1\n")
    (tmp_path / "broken.py").write_text("def get_config():\n    import no_such_module\n")
    (tmp_path / "none.py.py").write_text("def get_config():\n    pass\n")
    with pytest.raises(ConfigError) as e:
        command_flags.experiment_of(parse(*flag.format(tmp_path).split())[1])
    assert text in str(e.value) and "Traceback" not in str(e.value)


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

"""Flags of a command and the experiment of --config: every mistake is one ConfigError that says what
would work."""

import pathlib
import shlex

import pytest
from absl import flags

import moejax
from moejax.commands import flags as command_flags
from moejax.config import ConfigError, ExperimentConfig
from moejax.routers import ROUTERS, router_options

ROOT = pathlib.Path(moejax.__file__).parents[1]
USAGE = "usage: moejax try --size=3"
GOOD = """\
import dataclasses

from moejax.config import ConfigError, ExperimentConfig, ModelConfig, MoEConfig
from moejax.config_io import to_config_dict
from moejax.routers import router_options


def get_config(variant=""):
    if variant not in ("", "dense"):
        raise ConfigError(f"no variant {variant!r}; leave it out")
    router = router_options(score="sigmoid", routed_scaling=2.5)
    moe = MoEConfig() if variant else MoEConfig(num_experts=8, d_expert=16, router=router)
    return to_config_dict(ExperimentConfig(name="tiny" + variant, model=ModelConfig(moe=moe)))
"""
FILES = {
    "x.py": GOOD,
    "text.py": "A page of text.\n",
    "zeros.py": "\0",
    "empty.py": "x = 1\n",
    "number.py": "get_config = 1\n",
    "builtin.py": "get_config = dict\n",
    "zz_page.py": "Another page of text.\n",
    "imports.py": "import zz_page\n",
    "broken.py": "def get_config():\n    import no_such_module\n",
    "deep.py": "import json\n\n\ndef get_config():\n    return json.loads('{')\n",
    "exit.py": "raise SystemExit('usage: a script')\n",
    "none.py": "def get_config():\n    pass\n",
    "whole.py": "from moejax.config import ExperimentConfig as get_config\n",
    "needs.py": "def get_config(size):\n    return size\n",
    "none_given.py": "def get_config():\n    return 1\n",
    "lazy.py": (
        "from __future__ import annotations\nimport dataclasses, typing\n"
        "from ml_collections import ConfigDict\n\n"
        "@dataclasses.dataclass\nclass A:\n    x: typing.ClassVar[int] = 1\n\n"
        "def get_config():\n    return ConfigDict({'optimizer': {'learning_rate': 1}})\n"
    ),
    "stray.py": (
        "from ml_collections import ConfigDict\n\ndef get_config():\n"
        "    return ConfigDict({'model': {'depth': 3, 'd_model': '64'}})\n"
    ),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parse(line):
    """(arguments, flags) of a command line."""
    fv = flags.FlagValues()
    command_flags.define_config(fv, "An experiment.")
    flags.DEFINE_integer("size", 3, "How many.", flag_values=fv)
    return command_flags.parse("try", USAGE, fv, shlex.split(line)), fv


def experiment(line) -> ExperimentConfig:
    _, fv = parse(line)
    return command_flags.experiment_of(fv, shlex.split(line))


def said(line) -> str:
    with pytest.raises(ConfigError) as e:
        experiment(line)
    assert "Traceback" not in str(e.value)
    return str(e.value)


def problems(line) -> list[str]:
    """What is said of the flags of a command line, one line each."""
    head, *lines = said(line).splitlines()
    assert head == f"{len(lines)} problem{'s' * (len(lines) > 1)} in the config:"
    return [line.removeprefix("  - ") for line in lines]


def test_arguments_and_overrides():
    line = "a --config=x.py --config.model.d_model=64 b - --config.train.seed 5 --size 4 -- --config.c=1"
    rest, fv = parse(line)
    assert rest == ["a", "b", "-", "--config.c=1"] and fv.size == 4 and fv.config == "x.py"
    cfg = experiment(line)
    assert (cfg.name, cfg.model.d_model, cfg.train.seed) == ("tiny", 64, 5)
    assert experiment("--config x.py:dense -config.model.d_model 64").name == "tinydense"
    assert parse("b")[1].config is None


def test_values_of_every_type():
    cfg = experiment(
        "--config=x.py --config.name=a=b --config.optimizer.learning_rate=1 --config.train.steps=5 "
        "--config.data.sources=a=x --config.data.sources=b=y --config.data.weights=(1,2.5) "
        "--config.model.attention.windows='[128, 0]' --config.mesh.rules=\"('expert=data',)\" "
        "--noconfig.compute.scan_layers --config.model.ffn_bias --config.model.tie_embeddings true "
        "--config.model.moe.ffn_bias false --config.optimizer.decay_at=0.5 --config.train.steps=6 "
        "--config.model.attention.sinks"
    )
    assert cfg.name == "a=b" and repr(cfg.optimizer.learning_rate) == "1.0"
    assert cfg.data.sources == ("a=x", "b=y") and cfg.data.weights == (1.0, 2.5)
    assert cfg.model.attention.windows == (128, 0) and cfg.mesh.rules == ("expert=data",)
    assert not cfg.compute.scan_layers and cfg.model.ffn_bias and cfg.model.tie_embeddings
    assert (
        cfg.model.attention.sinks
        and not cfg.model.moe.ffn_bias
        and cfg.optimizer.decay_at == (0.5,)
        and cfg.train.steps == 6
    )


def test_a_value_has_the_type_of_its_option_not_of_the_file():
    cfg = experiment("--config=lazy.py --config.optimizer.learning_rate=0.5")
    assert cfg.optimizer.learning_rate == 0.5 and cfg.model == ExperimentConfig().model


def test_flags_may_come_from_a_file(here):
    (here / "flags.txt").write_text("--config=x.py\n--config.train.steps=7\n")
    assert experiment("--flagfile=flags.txt").train.steps == 7


ROUTER = "--config.model.moe.router"


@pytest.mark.parametrize("line", [
    f"--config=x.py {ROUTER}.name=expert_choice {ROUTER}.capacity_factor=2",
    f"{ROUTER}.capacity_factor=2 {ROUTER}.name=expert_choice --config=x.py",
    f"{ROUTER}.capacity_factor 2 --config x.py {ROUTER}.name expert_choice",
    f"--config=x.py {ROUTER}.name=token_choice {ROUTER}.capacity_factor=2 {ROUTER}.name=expert_choice",
])  # fmt: skip
def test_a_router_and_its_options_in_any_order(line):
    cfg = experiment(line)
    # What both routers have keeps the file's value; the file's score is gone.
    options = router_options("expert_choice", capacity_factor=2.0, routed_scaling=2.5)
    assert cfg.model.moe.router == options
    assert cfg.model.moe.num_experts == 8 and cfg.name == "tiny"


def test_the_router_of_the_file_keeps_its_options():
    options = router_options(score="sigmoid", routed_scaling=2.5, num_groups=2)
    for name in ("", f"{ROUTER}.name=token_choice "):
        cfg = experiment(f"--config=x.py {name}{ROUTER}.num_groups=2")
        assert cfg.model.moe.router == options


def test_a_router_says_what_it_does_not_read():
    lines = problems(
        f"--config=x.py {ROUTER}.name=expert_choice --config.objective.z_loss=1 "
        "--config.objective.expert_loss=1"
    )
    assert lines == [
        "objective.expert_loss=1.0 is not read by model.moe.router.name='expert_choice': leave it at 0.0"
    ]


def test_help_lists_the_commands_own_flags_and_says_how_to_override(capsys):
    rest, _ = parse("--config=missing.py --help")
    out = capsys.readouterr().out
    assert rest is None and out.startswith(USAGE) and "None" not in out
    assert "How many. [3]" in out and "flagfile" not in out
    assert "--config.KEY=VALUE" in out and "those that only the old one has are gone" in out
    fv = flags.FlagValues()
    command_flags.parse("try", USAGE, fv, ["-h"])
    assert "--config" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, text",
    [
        ("--siz=2", "unknown flag --siz=2; did you mean --size?"),
        ("--confg=x.py", "unknown flag --confg=x.py; did you mean --config?"),
        ("--zzzz", "unknown flag --zzzz\n"),
        ("--size=two", "'two'"),
        ("--size", "Missing value for flag --size"),
        ("--model.d_model=3", "unknown flag --model.d_model=3; --config.model.d_model=3 would work"),
        ("--cfg.model.d_model=3", "--config.model.d_model=3 would work"),
        ("--moe.num_experts 3", "unknown flag --moe.num_experts; --config.model.moe.num_experts would work"),
        ("--model.remat=full", "--config.compute.remat=full would work"),
        ("--seed=3", "--config.data.seed=3 or --config.train.seed=3 or"),
        ("--config.name=a", "--config.name=a changes an option of an experiment: give --config=FILE.py"),
        ("--flagfile=none.txt", "none.txt"),
        ("--config=x.py --noconfig.compute.scan_layers=1", "unknown flag --noconfig.compute.scan_layers=1"),
    ],
)  # fmt: skip
def test_flags_that_are_none(line, text):
    with pytest.raises(ConfigError) as e:
        parse(line)
    assert text in f"{e.value}\n" and str(e.value).endswith(USAGE)


def test_a_command_without_an_experiment_has_no_overrides():
    fv = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Where.", flag_values=fv)
    for arg in ("--config.train.steps=3", "--model.d_model=3"):
        with pytest.raises(ConfigError) as e:
            command_flags.parse("try", USAGE, fv, [arg])
        assert str(e.value) == f"unknown flag {arg}\n{USAGE}"


def test_a_command_of_flags_alone(capsys):
    def needed(*argv):
        fv = flags.FlagValues()
        for name in ("workdir", "hf_dir", "dtype"):
            flags.DEFINE_string(name, None, "Where.", flag_values=fv)
        return command_flags.parse_needed("try", USAGE, fv, list(argv), ("workdir", "hf_dir"))

    assert needed("--workdir=a", "--hf_dir=b") and not needed("--help")
    assert capsys.readouterr().out.startswith(USAGE)
    with pytest.raises(ConfigError, match=r"^try needs --workdir and --hf_dir\nusage"):
        needed()
    with pytest.raises(ConfigError, match=r"^try needs --hf_dir\n"):
        needed("--workdir=a")
    with pytest.raises(ConfigError, match=r"^unexpected \['c'\]\n"):
        needed("--workdir=a", "--hf_dir=b", "c")


def test_all_unknown_flags_are_named_at_once():
    with pytest.raises(ConfigError) as e:
        parse("--siz=2 --steps=3 a --d_modell=3 -- --fine")
    assert len(str(e.value).splitlines()) == 4


# Flags after --config=x.py, and what is said of them. A line for each of several keys.
OVERRIDES = {
    "moe.num_experts=1": "unknown key moe.num_experts; it is model.moe.num_experts",
    "d_model=1": "unknown key d_model; it is model.d_model",
    "moe.ffn_bias=1": "unknown key moe.ffn_bias; it is model.moe.ffn_bias",
    "zzz.qqq=1":
        "unknown key zzz.qqq; known keys: name, model, objective, compute, data, optimizer, train, mesh",
    "model.d_modl=1": "unknown key model.d_modl; did you mean model.d_model?",
    "modle.d_modl=1": "unknown key modle.d_modl; did you mean model.d_model?",
    "model.d_model.x=1": "unknown key model.d_model.x; did you mean model.d_model?",
    "data.sources[0]=1": "unknown key data.sources[0]; did you mean data.sources?",
    "zzz 3": "unknown key zzz; known keys: name, model, objective, compute, data, optimizer, train, mesh",
    "model=3": "--config.model=3: model is a group of options: model.vocab_size, model.d_model, ",
    # What moved since 0.1.0.
    "model.moe.expert_loss=.1": "--config.model.moe.expert_loss=.1 is now --config.objective.expert_loss=.1",
    "model.moe.z_loss": "--config.model.moe.z_loss is now --config.objective.z_loss=",
    "model.mtp_loss_weight=0": "--config.model.mtp_loss_weight=0 is now --config.objective.mtp_loss_weight=0",
    "model.remat full": "--config.model.remat=full is now --config.compute.remat=full",
    "model.moe.score=sigmoid": "is now --config.model.moe.router.score=sigmoid",
    "model.moe.router=expert_choice":
        "--config.model.moe.router=expert_choice is now --config.model.moe.router.name=expert_choice",
    "model.moe.dispatcher=capacity": "is now --config.objective.capacity_factor=1.25",
    "model.moe.dispatcher=dropless": "is now --config.compute.dispatcher=auto",
    "model.moe.dispatcher=dense": "is now --config.compute.dispatcher=dense",
    "model.moe.grouped_matmul=blocked": "is now --config.compute.grouped_matmul=auto",
    "model.moe.bias_update=sign":
        "is now --config.model.moe.router.expert_bias=True --config.objective.bias_update=sign",
    "model.moe.bias_update=frozen":
        "is now --config.model.moe.router.expert_bias=True --config.objective.bias_update=none",
    "model.moe.capacity_factor=2":
        "unknown key model.moe.capacity_factor; it is objective.capacity_factor or model.moe.router.capa",
    # Values of another type.
    "model.d_model=two": "model.d_model must be an int, not 'two', e.g. --config.model.d_model=128",
    "model.d_model=2.5": "model.d_model must be an int, not '2.5', e.g. --config.model.d_model=128",
    "model.d_model=": "model.d_model must be an int, not '', e.g. --config.model.d_model=128",
    "model.norm_eps=small": "model.norm_eps must be a float, not 'small', e.g. --config.model.norm_eps=1e-06",
    "model.norm_eps=nan":
        "model.norm_eps must be a finite float, not 'nan', e.g. --config.model.norm_eps=1e-06",
    "compute.scan_layers=maybe":
        "compute.scan_layers must be a bool, not 'maybe', e.g. --config.compute.scan_layers=True",
    "train.seed": "--config.train.seed needs a value, e.g. --config.train.seed=0",
    # Tuples.
    "data.sources=(builtin,code=x)":
        "data.sources must be a tuple of strs, not '(builtin,code=x)', "
        "e.g. --config.data.sources=\"('a=b', 'c=d')\"",
    "data.sources=(builtin)": "data.sources must be a tuple of strs, not '(builtin)', e.g. --config",
    "data.sources=(builtin,code)": "data.sources must be a tuple of strs, not '(builtin,code)', e.g. --config",
    "data.sources=a=x,b=y": "data.sources must be a tuple of strs, not 'a=x,b=y', e.g. --config",
    "data.sources=a,b": "data.sources must be a tuple of strs, not 'a,b', e.g. --config",
    "data.sources=": "data.sources must be a tuple of strs, not '', e.g. --config",
    "data.sources=(1,2)": "data.sources must be a tuple of strs, not '(1,2)', e.g. --config",
    "data.weights='(1 2)'":
        "data.weights must be a tuple of floats, not '(1 2)', e.g. --config.data.weights=\"(0.5, 0.5)\"",
    "data.weights=a": "data.weights must be a tuple of floats, not 'a', e.g. --config.data.weights=",
    "data.weights=(nan,)": "data.weights must be a tuple of floats, not '(nan,)', e.g. --config.data.weights=",
    "model.attention.windows=1.5":
        "model.attention.windows must be a tuple of ints, not '1.5', "
        "e.g. --config.model.attention.windows=\"(128, 0)\"",
    "optimizer.newton_schulz=(1,2)":
        "optimizer.newton_schulz must be a tuple of tuples of floats, not '(1,2)', "
        "e.g. --config.optimizer.newton_schulz=\"((5.0, 3.4445, -4.775, 2.0315),)\"",
    # Routers.
    "model.moe.router.capacity_factor=2":
        "model.moe.router.capacity_factor is an option of the router expert_choice: "
        "choose it by model.moe.router.name=expert_choice",
    "model.moe.router.scor=softmax": "unknown key model.moe.router.scor; did you mean model.moe.router.score?",
    "model.moe.router.name=expert":
        "model.moe.router.name='expert': did you mean 'expert_choice'? choices are " + ", ".join(ROUTERS),
    "model.moe.router.name": "model.moe.router.name='': choices are " + ", ".join(ROUTERS),
    "model.moe.router.name=": "model.moe.router.name='': choices are " + ", ".join(ROUTERS),
    # Values that the checks refuse.
    "compute.remat=ful": "compute.remat='ful': did you mean 'full'? choices are none, full, dots",
    "train.steps=0": "train.steps=0 must be at least 1",
    "train.seed -5": "train.seed=-5 must be at least 0",
}  # fmt: skip


@pytest.mark.parametrize("flag", OVERRIDES)
def test_an_override_that_cannot_work(flag):
    (line,) = problems(f"--config=x.py --config.{flag}")
    assert OVERRIDES[flag] in line and "None" not in line


def test_all_of_them_are_named_at_once():
    known = [
        f for f, text in OVERRIDES.items() if "choices are" not in text and "at least" not in text
    ]
    keys = {f.partition("=")[0].partition(" ")[0] for f in known}
    lines = problems("--config=x.py " + " ".join(f"--config.{f}" for f in known))
    assert len(lines) == len(keys)
    assert len(problems("--config=x.py --config.zzz --config.d_model=1")) == 2
    # A router that there is none of has no options to be wrong about.
    lines = problems(f"--config=x.py {ROUTER}.name=zzz {ROUTER}.slope=1 --config.d_model=1")
    assert len(lines) == 2


@pytest.mark.parametrize(
    "config, text",
    [
        ("x.py:big", "--config=x.py:big: no variant 'big'; leave it out"),
        ("empty.py", "--config=empty.py: the file has no get_config()"),
        ("number.py", "--config=number.py: the file has no get_config()"),
        ("builtin.py", "--config=builtin.py: builtin.py: ValueError: no signature found"),
        ("imports.py", "zz_page.py, line 1: not Python: invalid syntax"),
        ("broken.py", "--config=broken.py: broken.py, line 2: ModuleNotFoundError: No module named 'no_such"),
        ("deep.py", "--config=deep.py: deep.py, line 5: JSONDecodeError: "),
        ("exit.py", "--config=exit.py: exit.py, line 1: SystemExit: usage: a script"),
        ("none.py", "get_config() returned None; it must return a ConfigDict"),
        ("whole.py", "get_config() returned ExperimentConfig(name='base'"),
        ("needs.py", "get_config(size) needs an argument after ':'"),
        ("none_given.py:a", "get_config() takes no argument after ':'"),
        ("text.py", "text.py, line 1: not Python: invalid syntax"),
        ("zeros.py", "zeros.py: not Python: "),
        ("stray.py", "--config=stray.py: 2 problems in the config:\n  - "),
        ("stray.py", "unknown key model.depth; did you mean model.mtp_depth?"),
        ("y.py", "--config=y.py: no such file (relative to {here}); "),
        (".", "--config=.: a folder; broken.py or "),
        ("/", "--config=/: a folder; "),
    ],
)  # fmt: skip
def test_configs_that_are_none(config, text, here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    assert text.format(here=here) in said(f"--config={config}")


@pytest.mark.parametrize(
    "config, found",
    [
        ("neds.py", "needs.py"), ("needs", "needs.py"), ("nowhere/lazy.py", "lazy.py"),
        ("lazy:dense", "lazy.py"),
        ("other/quick.py", "other/quik.py"), ("other/quik", "other/quik.py"), ("other", "other/quik.py"),
        ("fast.py", "experiments/fast.py"), ("experiment/fast.py", "experiments/fast.py"),
        ("experiments.fast:dense", "experiments/fast.py"), ("experiments/fst", "experiments/fast.py"),
        ("experiments/finetune.py", f"{ROOT}/experiments/finetune.py"),
        ("finetune", f"{ROOT}/experiments/finetune.py"),
    ],
)  # fmt: skip
def test_the_nearest_file_that_would_work(config, found, here):
    for name in ("other/quik.py", "experiments/fast.py"):
        (here / name).parent.mkdir()
        (here / name).write_text(GOOD)
    (here / "other/quick_helper.py").write_text("# without the function\n")
    text = said(f"--config={config}")
    assert f"; {found} would work" in text or f"; {found} or " in text
    assert pathlib.Path(found).is_file()


def test_where_there_is_no_config_at_all(here, monkeypatch):
    (here / "bare").mkdir()
    monkeypatch.chdir(here / "bare")
    monkeypatch.setattr(moejax, "__file__", str(here / "bare/moejax/__init__.py"))
    assert said("--config=x.py").endswith("; name a Python file")

"""`moejax plan` and `moejax models`: their tables, and what they refuse."""

import csv
import io
import json
import resource
import subprocess
import sys

import pytest

from moejax.__main__ import main
from moejax.commands.models import main as models_main
from moejax.commands.plan import main as plan_main
from moejax.config import ConfigError, ExperimentConfig, ModelConfig
from moejax.config_io import to_json
from moejax.cost import models
from moejax.models import zoo
from moejax.text import (
    FORMATS,
)

ISSUE = ["deepseek-moe-16b", "llama-2-7b", "llama-1-65b", "gpt-2-xl", "gpt-4"] + [
    "deepseek-v3",
    "deepseek-v4.1-flash",
]


def test_models_command(capsys):
    assert models_main(ISSUE) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.split("\n"))) <= 100
    gpt4 = [line for line in out.split("\n") if line.startswith("gpt-4")]
    assert len(gpt4) == 3 and all("undisclosed" in line for line in gpt4)
    assert not any(c.isdigit() for c in gpt4[1].replace("gpt-4", ""))
    v3 = " ".join(line for line in out.split("\n") if line.startswith("deepseek-v3"))
    assert "671B" in v3 and "$5.576M" in v3 and "274.5 MiB" in v3


def test_models_csv_has_plain_numbers(capsys):
    models_main(["gpt-4", "deepseek-v3", "--baseline=deepseek-v3", "--format=csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows[0]["total"] == rows[0]["flops"] == "undisclosed"
    assert int(rows[1]["total"]) == 671_026_419_200 and float(rows[1]["relative"]) == 1.0
    assert int(rows[1]["cost"]) == 5_576_000


def test_models_json_has_the_same_numbers(capsys):
    models_main(["gpt-4", "deepseek-v3", "--format=json"])
    [table] = json.loads(capsys.readouterr().out)
    gpt4, v3 = (dict(zip(table["header"], row, strict=True)) for row in table["rows"])
    assert gpt4["total"] == "undisclosed" and v3["total"] == 671_026_419_200


def test_models_markdown_is_one_table(capsys):
    models_main(["gpt-2", "--format=markdown"])
    lines = [s for s in capsys.readouterr().out.split("\n") if s.startswith("|")]
    assert len(lines) == 3 and len({s.count("|") for s in lines}) == 1


def test_models_a_config_of_ones_own(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(zoo.load_hf("gpt-2")))
    own, known = models.compare([str(tmp_path), "gpt-2"])
    assert own.total == known.total and own.source == "" and own.tokens is None
    assert own.relative == 1.0


def test_undisclosed_baseline_gives_no_ratio():
    row = models.compare(["gpt-2"], baseline="gpt-4")[0]
    assert row.relative is None and row.flops


def test_models_plot(tmp_path):
    target = tmp_path / "out.png"
    models_main([*ISSUE, f"--plot={target}", "--format=csv"])
    assert target.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and target.stat().st_size > 10_000
    with pytest.raises(ConfigError, match="does not exist"):
        models_main(["gpt-2", f"--plot={tmp_path}/none/x.png"])


@pytest.mark.parametrize("name", ["deepseek-moe-16b", "deepseek-v4-pro", "kimi-k2"])
@pytest.mark.parametrize("style", FORMATS)
def test_plan_command(name, style, capsys):
    assert (
        plan_main([name, "--device=h200", "--batch=8", "--tokens=1e12", f"--format={style}"]) == 0
    )
    out = capsys.readouterr().out
    assert "routed experts" in out and "decode" in out
    if style == "table":
        assert max(map(len, out.split("\n"))) <= 100


def test_plan_has_exact_numbers_for_programs(capsys):
    how = ["deepseek-moe-16b", "--device=h200", "--tokens=1e12"]
    plan_main([*how, "--format=json"])
    parameters, *_, training, inference = json.loads(capsys.readouterr().out)
    # 2401.06066 Table 1 has 16.4B and 2.8B; the test of counts has the parts.
    assert ["= with embeddings", 16_375_728_128, 2_828_650_496] in parameters["rows"]
    assert dict(inference["rows"])["weights"] == 2 * 16_375_728_128
    hours = dict(training["rows"])["device hours"]
    assert isinstance(hours, float) and hours > 1000
    plan_main([*how, "--format=csv"])
    assert "= with embeddings,16375728128,2828650496" in capsys.readouterr().out.split("\n")


def test_plan_of_v3_counts_multi_token_prediction_apart(capsys):
    plan_main(["deepseek-v3"])
    rows = [r.split("  ") for r in capsys.readouterr().out.split("\n") if r.startswith("training")]
    plain, _, with_mtp = (r[-1] for r in rows)
    assert plain == "250.4G" and with_mtp > plain


def test_plan_says_what_binds_and_what_fits(capsys):
    plan_main(["llama-2-7b", "--batch=8", "--price=2", "--tokens=2e12"])
    out = capsys.readouterr().out
    assert "does not fit; nearest that does" in out and "devices (data=" in out
    assert "limit" in out and "compute (compute" in out
    assert "$" in out.split("money")[1]
    plan_main(["llama-2-7b", "--batch=8", "--mesh=fsdp=8", "--tokens=2e12"])
    out = capsys.readouterr().out
    assert "buffer_factor" not in out
    assert "does not fit" not in out
    assert "no price for h100; pass --price" in out


def test_plan_says_what_bounded_buffers_would_save(capsys):
    plan_main(["deepseek-moe-16b", "--batch=64", "--mesh=fsdp=8,expert=8", "--micro_batch=64"])
    lines = [r.strip().split("  ", 1) for r in capsys.readouterr().out.split("\n")]
    rows = {r[0]: r[1] for r in reversed(lines) if len(r) == 2}  # training comes first
    whole, bounded = rows["= memory per device"], rows["with compute.buffer_factor=2"]
    assert float(bounded.split()[0]) < float(whole.split()[0])


# ml_collections loads the file in a way Python calls deprecated.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
def test_plan_of_a_directory_and_of_an_experiment(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(zoo.load_hf("deepseek-v3.2")))
    plan_main([f"--hf_config={tmp_path}"])
    assert "indexer" in capsys.readouterr().out
    experiment = tmp_path / "tiny.py"
    experiment.write_text(
        "from moejax.config import ExperimentConfig\n"
        "from moejax.config_io import to_config_dict\n"
        "def get_config():\n    return to_config_dict(ExperimentConfig(name='tiny'))\n"
    )
    plan_main([f"--config={experiment}", "--config.model.d_model=64", "--device=h100"])
    out = capsys.readouterr().out
    with pytest.raises(ConfigError, match="d_modl"):
        plan_main([f"--config={experiment}", "--config.model.d_modl=64"])
    assert "tiny: 4 layers of width 64, dense" in out and "float32, remat none" in out


BAD = {
    "unknown model": (["deepseek-v33"], "did you mean deepseek-v3"),
    "undisclosed": (["gpt-4"], "gpt-4 is undisclosed"),
    "no model": ([], "one model, not 0"),
    "two models": (["gpt-2", "gpt-2-xl"], "one model, not 2"),
    "unknown flag": (["gpt-2", "--foo=1"], "foo"),
    "device": (["gpt-2", "--device=h10"], "did you mean h100"),
    "mesh axis": (["gpt-2", "--mesh=pipeline=2"], "one of data, fsdp, expert, tensor"),
    "mesh size": (["gpt-2", "--mesh=fsdp=0"], "size at least 1"),
    "mesh does not divide": (["gpt-2", "--mesh=fsdp=7"], "their product may be 1, 2, 3, 4, 6"),
    "counted mesh": (["deepseek-v4.1-flash", "--mesh=expert=7"], "expert may be 1, 2, 3, 4, 6, 8"),
    "no file": (["--hf_config=/nowhere"], "/nowhere does not exist"),
    "context": (["gpt-2", "--context=5000"], "maximum of 1024"),
    "remat": (["gpt-2", "--remat=ful"], "did you mean 'full'"),
    "verify": (["gpt-2", "--verify"], "needs --config"),
    "no experiment": (["--config=/nowhere.py"], "/nowhere.py"),
}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.parametrize("argv, text", BAD.values(), ids=BAD)
def test_plan_refuses(argv, text):
    with pytest.raises(ConfigError) as e:
        plan_main(argv)
    assert text in str(e.value)


def test_models_refuses(tmp_path):
    for argv, text in (
        ([], "needs the names"),
        (["gpt-5"], "did you mean gpt-4 or gpt-3 or gpt-2"),
        (["gpt-2", "--baseline=x"], "unknown model 'x'"),
        (["gpt-2", "--context=0"], "context=0"),
    ):
        with pytest.raises(ConfigError) as e:
            models_main(argv)
        assert text in str(e.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not readable JSON"):
        models_main([str(tmp_path)])


def test_help(capsys):
    assert plan_main(["--help"]) == 0 and models_main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: moejax plan" in out and "--baseline" in out


def test_answers_in_time():
    """The slowest case, a new process, the largest models: under 3 seconds, of which importing jax is one.
    Seconds of the processor: what a busy machine adds is not ours."""
    code = (
        "import sys\nfrom moejax.__main__ import main\n"
        "assert main(['models', 'deepseek-v4-pro', 'kimi-k2', 'deepseek-v3']) == 0\n"
        "assert main(['plan', 'kimi-k2']) == 0\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize("argv", [["gpt-2", "llama-2-7b"], ["x", "--context=4096"]])
def test_old_calls_of_compare_say_where_the_table_went(argv, capsys):
    assert main(["compare", *argv]) == 2
    assert f"now: moejax models {' '.join(argv)}" in capsys.readouterr().err


def test_plan_of_a_run(tmp_path, capsys):
    """The same as of the config that it was trained with; imported runs have no other."""
    cfg = ExperimentConfig(model=ModelConfig(vocab_size=258, d_model=64, num_layers=2))
    (tmp_path / "config.json").write_text(to_json(cfg))
    assert plan_main([f"--workdir={tmp_path}", "--device=h200", "--format=json"]) == 0
    parameters = json.loads(capsys.readouterr().out)[0]
    assert ["embedding", 258 * 64, 258 * 64] in parameters["rows"]
    with pytest.raises(ConfigError, match="plan takes one model, not 2"):
        plan_main(["gpt-2", f"--workdir={tmp_path}"])
    with pytest.raises(ConfigError, match=r"config\.json"):
        plan_main([f"--workdir={tmp_path / 'none'}"])

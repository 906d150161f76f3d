"""The experiments: each gives a config that is valid, and the quickstart's two variants compare fairly."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import pytest

from moejax.commands import sweep_file
from moejax.commands.config_file import get_config
from moejax.config import ConfigError, DataConfig, ExperimentConfig, ModelConfig, ObjectiveConfig
from moejax.config_io import from_config_dict, to_json
from moejax.cost.architecture import counts, of_model
from moejax.cost.flops import flops_per_token
from moejax.data.vocabulary import expected_tokens, with_vocabulary
from moejax.routers import ROUTERS

FOLDER = pathlib.Path(__file__).parent.parent / "experiments"
FILES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")


def load(name, *variant) -> ExperimentConfig:
    return from_config_dict(get_config(":".join((str(FOLDER / f"{name}.py"), *variant))))


@pytest.mark.parametrize("name", FILES)
def test_gives_a_valid_config(name):
    cfg = load(name, *(["runs/a"] if name == "finetune" else []))
    assert cfg.name and cfg.train.steps > 0


@pytest.mark.parametrize(
    "name", [n for n in FILES if "def get_sweep" in (FOLDER / f"{n}.py").read_text()]
)
def test_every_variant_of_a_sweep_is_valid(name, tmp_path, monkeypatch):
    if name == "upcycling":  # the base that the file asks for
        base = tmp_path / "runs/upcycling-base"
        (base / "checkpoints/300").mkdir(parents=True)
        (base / "config.json").write_text(to_json(load(name, "base")))
        monkeypatch.chdir(tmp_path)
    plan = sweep_file.read(str(FOLDER / f"{name}.py"), [])
    for variant in plan.variants:
        cfg = plan.experiment(variant, plan.seeds[0])
        assert cfg.train.seed == cfg.data.seed == plan.seeds[0]
        with_vocabulary(cfg, expected_tokens(cfg.data))  # as `moejax train` checks it


def test_dense_quickstart_differs_by_its_experts_alone():
    moe, dense = load("quickstart", "moe"), load("quickstart", "dense")
    assert load("quickstart") == moe
    assert moe.model.num_moe_layers == 3 and dense.model.num_moe_layers == 0
    same = dataclasses.replace(moe.model, moe=dense.model.moe)
    dense_twin = dataclasses.replace(moe, name=dense.name, model=same, objective=dense.objective)
    assert dense_twin == dense
    # Per token: 4 routed experts and a shared one of width 96 for an FFN of 480, and a router besides.
    arch = of_model(moe.model)
    active = counts(arch)["without embeddings"].active
    twin = counts(of_model(dense.model))["without embeddings"].active
    router = sum(p.active for p in arch.parts if p.name in ("router", "balance bias"))
    assert active - twin == router == 3 * (192 * 32 + 32)
    assert active == pytest.approx(twin, rel=0.02)


def test_finetuning_says_nothing_of_what_its_base_decides():
    cfg = load("finetune", "runs/a")
    assert (cfg.model, cfg.objective) == (ModelConfig(), ObjectiveConfig())
    assert cfg.data == DataConfig() and cfg.train.init_from == "runs/a"
    with pytest.raises(ConfigError, match=r"experiments/finetune\.py:RUN"):
        load("finetune")


def test_unknown_variant_names_the_variants():
    with pytest.raises(ConfigError, match=r"quickstart\.py:big.*variants: moe, dense"):
        load("quickstart", "big")


def test_routers_compute_equally_much_for_a_token():
    widths = {}
    for name, router in ROUTERS.items():
        cfg = load("routers", name)
        given = dict(router.recipe)
        assert all(_at(cfg, key) == value for key, value in given.items()), name
        used = cfg.model.experts_used
        if "model.moe.d_expert" not in given:
            widths[name] = used * cfg.model.moe.d_expert
        assert cfg.model.moe.shared_width == 64
    # Rounded to whole units of each expert.
    assert all(width == pytest.approx(256, rel=0.03) for width in widths.values()), widths
    with pytest.raises(ConfigError, match="did you mean 'expert_choice'"):
        load("routers", "expert_choic")


def _at(cfg, key):
    for part in key.split("."):
        cfg = getattr(cfg, part)
    return cfg


@pytest.mark.parametrize(
    "name",
    ["mixture_against_dense", "granularity", "shared_experts", "balance", "scores", "first_layer"],
)
def test_what_claims_equal_compute_has_it(name):
    """The parameters that a token uses are equally many, routers aside."""
    plan = sweep_file.read(str(FOLDER / f"{name}.py"), [])
    used = {v: _used(plan.experiment(v, 0)) for v in plan.variants}
    assert len(set(used.values())) == 1, used


def _used(cfg: ExperimentConfig) -> float:
    parts = of_model(with_vocabulary(cfg, 2048).model).parts
    return sum(p.active for p in parts if p.name not in ("router", "balance bias"))


def test_experts_per_token_is_two_questions():
    plan = sweep_file.read(str(FOLDER / "experts_per_token.py"), [])
    cfgs = {v: plan.experiment(v, 0) for v in plan.variants}
    flops = {_used(c) for v, c in cfgs.items() if v.startswith("flops")}
    assert len(flops) == 1
    same = [c for v, c in cfgs.items() if v.startswith("memory") or v == plan.baseline]
    sizes = {
        counts(of_model(with_vocabulary(c, 2048).model))["with embeddings"].total for c in same
    }
    assert len(sizes) == 1 and len({_used(c) for c in same}) == 4


def test_upcycling_adds_equal_compute():
    def flops(cfg):
        per_token = flops_per_token(of_model(cfg.model), "train", cfg.data.seq_len).total
        assert per_token is not None
        return per_token * cfg.train.steps

    base, scratch = (with_vocabulary(load("upcycling", v), 2048) for v in ("base", "scratch"))
    assert flops(scratch) == pytest.approx(flops(base), rel=0.005)  # whole steps
    assert scratch.model.moe.d_expert == base.model.d_ff


def test_the_phone_book_is_what_its_file_says(tmp_path):
    path = FOLDER / "phone_book.py"
    done = subprocess.run([sys.executable, str(path), str(tmp_path / "a.jsonl")], check=False)
    assert done.returncode == 0
    pages = [json.loads(x)["text"] for x in (tmp_path / "a.jsonl").read_text().splitlines()]
    entries = {e for page in pages for e in page.splitlines()}
    assert len(pages) == 8000 and len(entries) == 1000
    assert all(re.fullmatch(r"([bdfgklmnprstvz][aeiou]){3} \d{7}", e) for e in entries)
    assert len({e.split()[0] for e in entries}) == len(entries)  # a name has one number

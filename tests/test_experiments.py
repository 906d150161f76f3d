"""The experiments: each gives a config that is valid, and the quickstart's two variants compare fairly."""

import dataclasses
import pathlib
import runpy

import pytest

from moejax.commands import sweep_file
from moejax.config import ConfigError, DataConfig, ExperimentConfig, ModelConfig, ObjectiveConfig
from moejax.config_io import from_config_dict
from moejax.cost.architecture import counts, of_model
from moejax.data.vocabulary import expected_tokens, with_vocabulary
from moejax.routers import ROUTERS

FOLDER = pathlib.Path(__file__).parent.parent / "experiments"
FILES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")


def load(name, *variant) -> ExperimentConfig:
    return from_config_dict(runpy.run_path(str(FOLDER / f"{name}.py"))["get_config"](*variant))


@pytest.mark.parametrize("name", FILES)
def test_gives_a_valid_config(name):
    cfg = load(name, *(["runs/a"] if name == "finetune" else []))
    assert cfg.name and cfg.train.steps > 0


@pytest.mark.parametrize(
    "name", [n for n in FILES if "def get_sweep" in (FOLDER / f"{n}.py").read_text()]
)
def test_every_variant_of_a_sweep_is_valid(name):
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

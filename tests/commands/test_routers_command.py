"""`moejax routers` and docs/routers.md say what the code does."""

import pathlib
import re

import pytest
from absl import flags

from moejax.commands import routers
from moejax.commands.flags import define_config, experiment_of
from moejax.config import ConfigError
from moejax.routers import ROUTERS
from moejax.routers.left_out import LEFT_OUT

ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_of_docs_is_up_to_date():
    path = ROOT / "docs/routers.md"
    said = "run: moejax routers --docs=docs/routers.md"
    assert routers.in_page(path.read_text()) == path.read_text(), said


def test_the_table_names_every_router_and_its_paper(capsys):
    assert routers.main([]) == 0
    out = capsys.readouterr().out
    for name, router in ROUTERS.items():
        assert re.search(rf"^{name} +{re.escape(router.source)}", out, re.MULTILINE), name
        assert re.search(r"\d{4}\.\d{5}|transformers|OpenReview|kexue", router.source), name
    assert all(why and source for _, source, why in LEFT_OUT)


@pytest.mark.parametrize("name", ROUTERS)
def test_every_page_is_whole(name):
    f = routers.facts(name)
    page = routers.page(name)
    assert len(ROUTERS[name].about) > 100
    assert all(meaning for _, _, _, meaning in f.options), "a comment beside every option"
    assert all(f"  {option} [{default}]" in page for option, default, *_ in f.options)
    assert 0 < f.used <= f.of + 1


@pytest.mark.parametrize("name", ROUTERS)
def test_the_flags_of_a_page_work(name):
    """On the quickstart, what they leave alone at its defaults."""
    said = re.search(r"Its flags: (.*)", routers.page(name))
    assert said
    fv = flags.FlagValues()
    define_config(fv, "")
    argv = ["--config=experiments/quickstart.py", *said[1].split(" --")]
    argv[2:] = [f"--{a}" for a in argv[2:]]
    off = ("sequence_loss=0", "bias_update=none")
    argv[2:2] = [f"--config.objective.{o}" for o in off]
    fv(["", argv[0]])
    cfg = experiment_of(fv, argv)
    assert cfg.model.moe.router.name == name


def test_a_page_is_made_between_its_marks():
    made = routers.in_page(f"before\n{routers.BEGIN}\nstale page\n{routers.END}\nafter\n")
    assert made.startswith("before\n") and made.endswith("after\n") and "stale page" not in made
    assert "| [token_choice](#token_choice) | DeepSeekMoE, [2401.06066](https://arxiv.org" in made
    with pytest.raises(ConfigError, match=r"x.md: no line <!-- begin"):
        routers.in_page("nothing", "x.md")


def test_an_unknown_router_is_named():
    with pytest.raises(ConfigError, match="did you mean 'expert_choice'"):
        routers.main(["expert_choise"])

"""`--intervene=` as text: what it reads, and what it refuses from the config alone, with what would work."""

import dataclasses
import json
import re

import numpy as np
import pytest
from intervene_case import DEEPSEEK, OLMOE

from moejax.config import ConfigError
from moejax.evals.intervene_text import check_all, check_alone, parse, read_values
from moejax.routers import router_options


def test_values_from_a_file(tmp_path):
    file = tmp_path / "a.json"
    table = [[1, 2.5, 0, 0], [3, 4, 5, 6]]
    file.write_text(
        json.dumps({"importance": {"reap": table, "gate": table}, "tokens": 7, "x": [1]})
    )
    np.testing.assert_array_equal(read_values(f"{file}#reap", (2, 4)), table)
    np.testing.assert_array_equal(read_values(f"{file}#importance.gate", (2, 4)), table)
    for text, problem in {
        f"{file}": "holds 2 tables, one is needed; it has 'importance.reap, importance.gate'",
        f"{file}#eap": "holds 0 tables named eap",
        f"{tmp_path / 'no'}": "cannot be read as JSON",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(problem)):
            read_values(text, (2, 4))
    with pytest.raises(
        ConfigError, match=re.escape("the table is [2, 4]; it must be finite numbers")
    ):
        read_values(f"{file}#reap", (2, 8))
    file.write_text('{"load": [[NaN, 1]], "big": [[1e999, 1%s]]}' % ("0" * 400))
    for name in ("load", "big"):
        with pytest.raises(ConfigError):
            read_values(f"{file}#{name}", (1, 2))
    file.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_values(str(file), (1, 2))


WRONG = {
    "top": "top=1 would work",
    "top=x": "cannot read 'x'; top=1 would work",
    "top=-1": "cannot read '-1'",
    "bottom=1:by": "bottom has no option 'by'; it has silent, layers=.., by=..",
    "nothing=1": "there is no 'nothing'; there are experts, top",
    "uniform=3": "uniform would work",
    "k=0": "k must be at least 1",
    "random=1:seeds=0": "seeds must be at least 1",
    "temperature=0": "cannot read '0'; temperature=2",
    "experts=1": "experts=0/3 would work",
    "": "names nothing",
    "k=2,k=3": "k is given twice",
    "uniform,k=2": "uniform says which experts a token has, and so does k=2",
    "uniform,routes_from=x": "and so does routes_from=x",
    "random=1:seeds=2,random=2:seeds=2": "give seeds to one",
    "top=9": "a layer has 8 experts, not 9",
    "experts=2/0": "there is no MoE layer 2; there are 0 to 1",
    "experts=0/8": "there is no expert 8; there are 0 to 7",
    "top=6": "6 are knocked out: 2 are left, and a token needs 3; at most 5 would work",
    "top=3,random=3": "6 are knocked out",
    "no_shared:one_more,best=5": "a token needs 4; at most 4 would work",
    "k=9": "experts_per_token=9 must be between 1 and",
    "random=1:layers=7": "there is no MoE layer 7",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_is_refused_from_the_config(text):
    with pytest.raises(ConfigError, match=re.escape(WRONG[text])):
        check_all(parse([text]), DEEPSEEK)


OTHERS = [
    (
        "expert_choice",
        "top=1",
        "expert_choice fills slots: no expert can be barred; setting its output weights",
    ),
    ("expert_choice", "uniform", "lets no token name its experts"),
    ("soft_moe", "k=2", "another K changes nothing"),
    ("hash", "experts=0/0", "hash reads its routes in a table: no expert can be barred"),
    ("hash", "k=3", "for each entry of a table; k=2 alone would work"),
    ("hash", "best=1", "this router has no scores"),
    ("cosine", "temperature=2", "has no logits x W"),
    ("gshard", "k=3", "this router takes 2"),
    ("top_p", "k=3", "another K changes nothing"),
    ("token_choice", "no_shared", "has no shared experts"),
]


@pytest.mark.parametrize(("router", "text", "problem"), OTHERS)
def test_what_a_router_cannot(router, text, problem):
    cfg = dataclasses.replace(
        OLMOE, moe=dataclasses.replace(OLMOE.moe, router=router_options(router))
    )
    with pytest.raises(ConfigError, match=re.escape(problem)):
        check_all(parse([text]), cfg)
    if "fills slots" in problem or "table: no" in problem:
        check_all(parse([text + ":silent"]), cfg)


def test_k_in_groups_and_dense_models():
    groups = router_options(num_groups=4, topk_groups=1)
    cfg = dataclasses.replace(OLMOE, moe=dataclasses.replace(OLMOE.moe, router=groups))
    with pytest.raises(ConfigError, match="topk_groups=1 groups of 2 experts hold fewer than"):
        check_all(parse(["k=3"]), cfg)
    dense = dataclasses.replace(OLMOE, num_dense_layers=2)
    for text in ("top=1", "k=2", "no_shared", "temperature=2", "uniform", "best=1"):
        with pytest.raises(ConfigError, match="the model is dense"):
            check_all(parse([text]), dense)


@pytest.mark.parametrize(
    ("text", "would"),
    [
        ("top=1", "top=1:by=FILE with counts would work"),
        ("uniform", "moejax evaluate takes it"),
        ("random=1:seeds=2", "without seeds"),
    ],
)
def test_what_generation_cannot(text, would):
    with pytest.raises(ConfigError, match=would):
        check_alone(parse([text]))
    check_alone(parse(["random=1,k=2,best=1,experts=0/1"]))

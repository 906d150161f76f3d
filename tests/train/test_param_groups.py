"""Parameter groups: what rules say, what they do, and that what is frozen costs nothing."""

import dataclasses
import pathlib
import re
import shlex

import jax
import numpy as np
import pytest
from absl import flags

from moejax.commands.flags import define_config, experiment_of, parse
from moejax.config import (
    AttentionConfig,
    ComputeConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from moejax.config_checks import READS
from moejax.config_io import from_config_dict
from moejax.data import synthetic_batch
from moejax.models import transformer
from moejax.param_groups import Treatment, parse_rule
from moejax.params import merge, path_name, roles, select
from moejax.train.optimizer import optimizer_of, split_trained
from moejax.train.state import abstract_state, create_state
from moejax.train.step import compile_step

ROOT = pathlib.Path(__file__).parents[2]
MODEL = ModelConfig(
    vocab_size=64,
    d_model=32,
    num_layers=4,
    num_dense_layers=3,
    d_ff=96,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=16),
    moe=MoEConfig(num_experts=4, d_expert=32),
)
ONE_LAYER = ("path=* frozen", "path=moe_blocks/* trained")


def experiment(*groups: str, **changes) -> ExperimentConfig:
    return ExperimentConfig(
        model=MODEL,
        objective=ObjectiveConfig(capacity_factor=1.25),
        compute=ComputeConfig(scan_layers=False),  # XLA counts the FLOPs of a loop's body once
        data=DataConfig(seq_len=32, batch_size=4),
        optimizer=OptimizerConfig(
            warmup_steps=0, schedule="constant", clip_norm=0.0, groups=groups, **changes
        ),
        train=TrainConfig(steps=10),
    )


def step_of(cfg: ExperimentConfig):
    """The compiled step, and the state before and after it."""
    state = create_state(cfg, jax.random.key(0), None)
    before = jax.device_get(state)
    compiled = compile_step(cfg).lower(state, synthetic_batch(32, 4, 64)).compile()
    after, metrics = compiled(state, synthetic_batch(32, 4, 64))
    assert int(metrics["skipped"]) == 0
    return compiled, before, jax.device_get(after)


def moved(before, after) -> dict[str, np.ndarray]:
    return {
        path_name(path): b - a
        for (path, a), b in zip(
            jax.tree_util.tree_leaves_with_path(before.params),
            jax.tree.leaves(after.params),
            strict=True,
        )
    }


@pytest.fixture(scope="module")
def plain():
    return step_of(experiment())


def test_rules_do_what_they_say(plain):
    rules = (
        "role=embedding lr=0.5",
        "path=*/experts/* lr=4 decay=0",
        "path=*/experts/w_up lr=2",  # the later rule wins, and leaves decay=0
        "path=*_norm/* decay=1",
        "path=*/router/* frozen",
    )
    got, want = moved(*step_of(experiment(*rules))[1:]), moved(*plain[1:])
    params = {
        path_name(p): np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(plain[1].params)
    }
    rate, wd = 1e-3, 0.1
    for path, step in want.items():
        factor, decay = 1.0, 0.0  # the change of what decays, in steps of rate * wd * parameter
        if path.startswith("embed"):
            factor = 0.5
        elif "/experts/" in path:
            factor, decay = (2.0 if path.endswith("w_up") else 4.0), 1.0
        elif "_norm/" in path:
            decay = -1.0
        expected = factor * (step + decay * rate * wd * params[path])
        if "/router/" in path:
            expected = 0 * step
        # Parameters near 1 (norms) round to 6e-8, and a step is a difference of two of them.
        np.testing.assert_allclose(got[path], expected, rtol=1e-4, atol=2e-7, err_msg=path)


def test_what_is_frozen_costs_nothing(plain):
    """All but the last of four layers frozen. The frozen layers below it need no backward pass at all, the
    head only that of its input. A weight costs 2 FLOPs forward, 2 for its input's gradient and 2 for its own:
    the three dense layers fall from 6 to 2 and the head from 6 to 4."""
    cfg = experiment(*ONE_LAYER)
    compiled, before, after = step_of(cfg)
    changed = {p for p, d in moved(before, after).items() if d.any()}
    assert changed == {p for p in moved(before, after) if p.startswith("moe_blocks/")}

    layer = select(before.params, changed)
    numbers = sum(a.size for a in jax.tree.leaves(layer))
    assert sum(a.size for a in jax.tree.leaves(before.opt_state) if a.ndim) == 2 * numbers
    bytes_of = {n: held(c) for n, c in (("all", experiment()), ("one", cfg))}
    assert bytes_of["one"] < 0.5 * bytes_of["all"]

    flops, whole = (c.cost_analysis()["flops"] for c in (compiled, plain[0]))
    assert flops < 0.6 * whole
    memory, all_of_it = (c.memory_analysis() for c in (compiled, plain[0]))
    assert memory.argument_size_in_bytes < all_of_it.argument_size_in_bytes


def held(cfg: ExperimentConfig) -> int:
    """Bytes of optimiser state."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(abstract_state(cfg).opt_state))


def test_the_trained_gradients_are_those_of_the_whole(plain):
    """The layer that is trained moves as it does when all are: nothing of its gradient is lost."""
    got, want = moved(*step_of(experiment(*ONE_LAYER))[1:]), moved(*plain[1:])
    for path in want:
        if path.startswith("moe_blocks/"):
            # Adam's first step is the gradient's sign but where it is about zero (eps), times 1e-3.
            np.testing.assert_allclose(got[path], want[path], atol=1e-6, err_msg=path)


def test_accumulation_takes_the_trained_part():
    cfg = experiment(*ONE_LAYER)
    two = dataclasses.replace(cfg, train=TrainConfig(steps=10, accumulation=2))
    changed = {p for p, d in moved(*step_of(two)[1:]).items() if d.any()}
    assert changed and all(p.startswith("moe_blocks/") for p in changed)


def test_parts_make_the_whole():
    params = {"a": {"x": 1, "y": 2}, "b": {"z": 3}, "c": 4}
    one, other = select(params, {"a/x", "c"}), select(params, {"a/y", "b/z"})
    assert one == {"a": {"x": 1}, "c": 4}
    assert merge(one, other) == merge(other, one) == params
    tree = transformer.param_specs(MODEL)
    assert split_trained(tree, experiment()) == (tree, {})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lr=2", "names no parameters: begin with path= or role="),
        ("path=*", "sets nothing: lr=, decay=, frozen or trained is missing"),
        ("role=matrx lr=2", "roles are matrix, vector, embedding, head, router"),
        ("path=* lr=0", "lr is a factor above 0; 'frozen' stops learning"),
        ("path=* lr=nan", "lr is a factor above 0"),
        ("path=* lr=fast", "lr is a factor above 0"),
        ("path=* decay=0.5", "decay is 0 or 1, whether optimizer.weight_decay applies"),
        ("path=* frozen=1", "'frozen=1' is none of path=, role=, lr=, decay=, frozen, trained"),
        ("path=* rate=1", "'rate=1' is none of path="),
        ("path=* frozen lr=2", "what is frozen has no lr and no decay"),
        ("path=* frozen trained", "twice"),
        ("path=* path=head lr=2", "twice"),
        ("path=* lr=1 lr=2", "twice"),
        ("", "names no parameters"),
    ],
)
def test_rules_are_checked(text, problem):
    with pytest.raises(ConfigError) as e:
        from_config_dict({"optimizer": {"groups": ["role=head lr=2", text]}})
    assert problem in str(e.value) and repr(text) in str(e.value)


@pytest.mark.parametrize(
    ("groups", "problem"),
    [
        (
            ("path=*/routr/* frozen",),
            "'path=*/routr/* frozen' matches no parameter; the nearest paths are "
            "moe_blocks/moe/router/kernel, ",
        ),
        (("role=head lr=2",), "this model has embedding, matrix, router, vector"),
        (("path=embed/* role=matrix lr=2",), "matches no parameter"),
        (("path=* frozen",), "everything is frozen: a later rule with 'trained'"),
    ],
)
def test_rules_must_match(groups, problem):
    tied = dataclasses.replace(MODEL, tie_embeddings=True)
    with pytest.raises(ConfigError) as e:
        OptimizerConfig(groups=groups).treatments(roles(transformer.param_specs(tied)))
    assert problem in str(e.value)


def test_a_rule_as_it_is_read():
    rule = parse_rule("role=matrix lr=1e-1 path=dense_blocks/* decay=1")
    assert rule.sets == {"lr": 0.1, "decay": True}
    assert rule.matches("dense_blocks/ffn/w_up", "matrix")
    assert not rule.matches("dense_blocks/ffn/w_up", "vector")
    assert not rule.matches("moe_blocks/dense_blocks/w", "matrix")
    got = OptimizerConfig(groups=("path=a lr=2", "path=* trained", "path=a decay=0")).treatments(
        {"a": "matrix", "b": "vector"}
    )
    assert got == {"a": Treatment(2.0, False, False), "b": Treatment(1.0, False, False)}


def test_the_page_is_right():
    """docs/optimizers.md: its table is `READS`, and its commands name optimisers that exist and parameters of
    the quickstart."""
    page = (ROOT / "docs/optimizers.md").read_text("utf-8")
    rows = [line.split("|")[1:-1] for line in page.split("\n## ")[0].splitlines() if "|" in line]
    table = {row[0].strip(" `"): tuple(re.findall(r"`(\w+)`", row[3])) for row in rows[2:]}
    assert table == READS
    commands = [shlex.split(x)[2:] for x in page.splitlines() if x.startswith("    moejax train")]
    assert len(commands) == 3
    for argv in commands:
        fv = flags.FlagValues()
        argv[0] = f"--config={ROOT / argv[0].removeprefix('--config=')}"
        define_config(fv, "An experiment.")
        flags.DEFINE_string("workdir", None, "Where.", flag_values=fv)
        parse("train", "", fv, argv)
        cfg = experiment_of(fv, argv)
        assert cfg.optimizer.groups
        jax.eval_shape(optimizer_of(cfg).init, split_trained(abstract_state(cfg).params, cfg)[0])

"""Profiling: which steps, which operation belongs to which part, and a real trace."""

import jax
import jax.numpy as jnp
import pytest

from moejax.config import ConfigError, DataConfig, ExperimentConfig, ModelConfig, MoEConfig
from moejax.train.profile import SCOPES, Profile, newest_trace, scopes_of, steps_of, time_table
from moejax.train.state import create_state
from moejax.train.step import compile_step
from moejax.train.verify import FIELDS

PROGRAM = """\
HloModule jit_f, is_scheduled=true

%body (p: f32[4]) -> f32[4] {
  %tanh.1 = f32[4]{0} tanh(%p), metadata={op_name="jit(f)/jvp()/while/body/attention/tanh" id=1}
  ROOT %fusion.2 = f32[4] fusion(%tanh.1), kind=kLoop, metadata={op_name="transpose(jvp(dispatch))/experts/mul"}
}
  %while.3 = (s32[], f32[4]{0}) while(%tuple), metadata={op_name="jit(f)/attention/while"}
  %copy.4 = f32[4]{0} copy(%x)
  %add.5 = f32[4]{0} add(%x, %x), metadata={op_name="jit(f)/attentional/add"}
"""


def test_the_innermost_scope_of_an_operation():
    assert scopes_of(PROGRAM) == {
        "tanh.1": ("attention", False),
        "fusion.2": ("experts", True),
        "copy.4": ("other", False),
        "add.5": ("other", False),
    }


def test_which_steps():
    assert steps_of("10:13", 20) == (10, 13) and steps_of("3:3", 3) == (3, 3)
    for text in ("10", "10:", "0:3", "5:4", "10:21", "a:b", "1:2:3", "-1:2"):
        with pytest.raises(ConfigError, match=r"such as 10:13, of steps from 1 to train.steps=20"):
            steps_of(text, 20)


def test_a_trace_of_real_steps(tmp_path):
    def step(x, w):
        def loss(w):
            with jax.named_scope("attention"):
                y = x
                for _ in range(30):
                    y = jnp.tanh(y @ w)
            with jax.named_scope("head"):
                return (y @ w).sum()

        return x, jax.grad(loss)(w)

    said = []
    step_fn = jax.jit(step)
    x = jnp.ones((256, 256)) / 256
    profile = Profile((2, 3), tmp_path, said.append)
    for number in range(1, 6):
        profile.before(number, step_fn, x, x)
        out = step_fn(x, x)
        profile.after(number, out)
    assert not profile.running and len(said) == 2
    table = time_table(newest_trace(tmp_path), profile.program, 2)
    share = {r[0]: float(r[-1].rstrip("%")) for r in table.rows}
    # 30 of 31 products are attention's; a busy machine moves the shares, but not this far.
    assert share["attention"] > 50 > share.get("head", 0.0)
    assert sum(share.values()) == pytest.approx(100, abs=1)
    # What Perfetto opens. The other file also holds every program that this process compiled before.
    (perfetto,) = tmp_path.rglob("*.trace.json.gz")
    assert perfetto.stat().st_size < 3_000_000


def test_the_real_step_has_every_scope():
    moe = MoEConfig(num_experts=4, d_expert=8, shared_experts=1)
    model = ModelConfig(vocab_size=32, d_model=16, num_layers=2, d_ff=32, moe=moe)
    cfg = ExperimentConfig(model=model, data=DataConfig(seq_len=16, batch_size=2))
    state = create_state(cfg, jax.random.key(0), None)
    shape = (cfg.data.batch_size, cfg.data.seq_len)
    batch = {name: jnp.ones(shape, jnp.int32) for name in FIELDS}
    program = compile_step(cfg, seed_key=jax.random.key(0)).lower(state, batch).compile().as_text()
    found = set(scopes_of(program).values())
    assert {scope for scope, _ in found} >= {*SCOPES}
    assert {(s, True) for s in ("attention", "ffn", "router", "experts", "shared")} <= found


def test_no_profile_does_nothing(tmp_path):
    profile = Profile(None, tmp_path, print)
    profile.before(1, None, None, None)
    profile.after(1, None)
    profile.stop()
    assert not list(tmp_path.iterdir())

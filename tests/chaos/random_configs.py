"""Draws experiments at random; each is refused with its reasons, or trains a step as the dense oracle does.

    python tests/chaos/random_configs.py --count=1000

Every option of the model, the router, the objective and of how it is computed is drawn from its range or its
choices. An accepted experiment takes a step: loss and gradients are finite, and equal to those of the same
model computed with every expert on every token, in one batch, without rematerialisation. Prints one line;
tracebacks and differences must be zero.
"""

import argparse
import collections
import dataclasses
import os
import pathlib
import random
import sys
import traceback
import typing

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from compile_flags import PLAIN  # noqa: E402
from damage import Found  # noqa: E402

# Sizes that a step of a few seconds has, and what is not about the step.
SIZES = {
    "model.vocab_size": (32, 40),
    "model.d_model": (8, 16),
    "model.num_layers": (1, 2, 3),
    "model.num_dense_layers": (0, 1),
    "model.d_ff": (16, 24),
    "model.max_seq_len": (8, 64),
    "model.init_std": (0.2,),
    "model.mtp_depth": (0, 0, 1),
    "model.moe.num_experts": (0, 2, 4, 8, 9),
    "model.moe.experts_per_token": (1, 2, 3),
    "model.moe.d_expert": (1, 8),
    "model.moe.shared_experts": (0, 1, 2),
    "model.moe.d_shared": (0, 8),
    "model.attention.num_heads": (2, 4),
    "model.attention.num_kv_heads": (1, 2, 4),
    "model.attention.head_dim": (4, 8),
    "model.attention.windows": ((), (4,), (4, 0)),
    "model.attention.q_lora_rank": (0, 8),
    "model.attention.kv_lora_rank": (0, 8),
    "model.attention.qk_nope_head_dim": (0, 4),
    "model.attention.qk_rope_head_dim": (0, 4),
    "model.attention.v_head_dim": (0, 4),
    "compute.attention_block": (0, 0, 3),
    "compute.loss_chunk": (0, 4, 100),
    # Rounded to fewer bits, a sum in another order is another number.
    "compute.dtype": ("float32",),
    "compute.router_dtype": ("float32",),
    "train.accumulation": (1, 1, 2, 4),
}
GROUPS = ("model", "objective", "compute")
CHANGED = 6  # options that differ from a small model's, on average


def draw(rng: random.Random, names: list[str]):
    """An experiment that may not hold together; not checked. `names`: of routers."""
    from moejax.config import DataConfig, ExperimentConfig
    from moejax.config_io import kinds, to_config_dict
    from moejax.routers import router_options
    from tests.flat import put

    cfg = ExperimentConfig(data=DataConfig(seq_len=8, batch_size=4, tokenizer="byte"))
    for key, values in SIZES.items():
        cfg = put(cfg, key, values[0] if key.startswith("model.attention.") else rng.choice(values))
    cfg = put(cfg, "model.moe.router", router_options(rng.choice(names)))
    keys = [k for k in kinds(cfg) if k.split(".")[0] in GROUPS and k != "model.moe.router.name"]
    keys = [k for k in keys if not dataclasses.is_dataclass(kinds(cfg)[k])]
    for key in rng.sample(keys, rng.randint(0, 2 * CHANGED)):
        value = SIZES.get(key) or values_of(cfg, key, kinds(cfg)[key], rng)
        cfg = put(cfg, key, rng.choice(value))
    return cfg, to_config_dict(cfg)


def values_of(cfg, key: str, kind: type, rng: random.Random) -> list[typing.Any]:
    """Some values that an option may have."""
    at = cfg
    *groups, last = key.split(".")
    for group in groups:
        at = getattr(at, group)
    metadata = type(at).__dataclass_fields__[last].metadata
    now = getattr(at, last)
    if "choices" in metadata:
        return list(metadata["choices"])
    if kind is bool:
        return [True, False]
    if "bounds" in metadata and kind in (int, float):
        bounds = {k: v for k, v in metadata["bounds"].items() if v is not None}
        least = bounds.get("least", bounds.get("above", 0))
        most = bounds.get("most", bounds.get("below", 4))
        if kind is int:
            return [now, int(least), int(least) + 1, int(most)]
        return [now, least + rng.random() * (most - least), least + 0.01]
    return [now]


def step(cfg):
    """Loss and gradients of one step on a batch with padding."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moejax.data import synthetic_batch
    from moejax.models import transformer
    from moejax.train.step import loss_and_grads

    batch = {k: np.array(v) for k, v in synthetic_batch(8, 4, cfg.model.vocab_size).items()}
    for name in batch:
        batch[name][1, 5:] = 0
    params, state = transformer.init_model(cfg.model, jax.random.key(0))
    run = jax.jit(lambda p, s, b: loss_and_grads(p, s, b, cfg))
    loss, _, grads = run(params, state, jax.tree.map(jnp.asarray, batch))
    return float(loss), grads


def about(cfg) -> str:
    return f"{cfg.model} {cfg.objective} {cfg.compute} accumulation {cfg.train.accumulation}"


def campaign(count: int, seed: int, names: list[str]) -> int:
    import jax
    import numpy as np

    from moejax.config import ConfigError
    from moejax.config_io import from_config_dict
    from moejax.mesh import check_layout, mesh_sizes
    from moejax.routers import ROUTERS
    from tests.flat import change

    rng, tally, found = random.Random(seed), collections.Counter(), Found(count)
    for number in range(count):
        found.advance()
        cfg, values = draw(rng, names or list(ROUTERS))
        try:
            cfg = from_config_dict(values)
            check_layout(cfg, mesh_sizes(cfg.mesh, 1), "cpu")  # as training does
        except ConfigError as e:
            tally["refused"] += 1
            if not str(e).strip():
                found.say(f"config {number}: no reason")
            continue
        except Exception:
            tally["TRACEBACK"] += 1
            found.say(f"config {number}: {traceback.format_exc()[-600:]}\n{cfg.model}")
            continue
        try:
            got = step(cfg)
            router = cfg.model.router
            tied = router is not None and (
                router.form == "slot"
                or not router.causal_in_training
                or cfg.objective.capacity_factor > 0
            )
            same = dict(
                dispatcher="dense", remat="none", scan_layers=False, loss_chunk=0, attention_block=0
            )
            if not tied:
                same["accumulation"] = 1  # otherwise the tokens of a micro-batch compete
            want = step(change(cfg, **same))
            finite = all(np.isfinite(a).all() for a in jax.tree.leaves(got))
            # float32 sums in another order, through up to three layers with weights of 0.2.
            close = jax.tree.map(
                lambda a, b: bool(np.allclose(a, b, rtol=2e-3, atol=2e-5)), got, want
            )
            right = finite and all(jax.tree.leaves(close))
            tally["right" if right else "DIFFERENT"] += 1
            if not right:
                off = [
                    jax.tree_util.keystr(p)
                    for p, ok in jax.tree_util.tree_leaves_with_path(close)
                    if not ok
                ]
                found.say(f"config {number}: {got[0]} for {want[0]}, {off[:4]}: {about(cfg)}")
        except Exception:
            tally["TRACEBACK"] += 1
            found.say(f"config {number}: {traceback.format_exc()[-1500:]}\n{about(cfg)}")
        if number % 10 == 9:
            jax.clear_caches()
    return found.end(
        f"{count} configs: {tally['refused']} refused, {tally['right']} trained as the dense oracle does; "
        f"different {tally['DIFFERENT']}, tracebacks {tally['TRACEBACK']}"
    )


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Two programs for each config, run once: compiling them well is not worth its time.
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {PLAIN}".strip()
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--routers", nargs="*", default=[])
    args = parser.parse_args()
    sys.exit(bool(campaign(args.count, args.seed, args.routers)))

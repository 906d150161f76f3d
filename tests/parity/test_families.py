"""Every family against its original implementation: logits, routes, continuations, gradients, export."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import parity_oracle as oracle
import pytest
import torch
from parity_cases import CASES
from parity_shapes import Case
from safetensors.numpy import load_file

from moejax.config import ModelConfig, ObjectiveConfig
from moejax.evals.generate import generate
from moejax.interop.hf_folder import open_folder
from moejax.interop.load import load_model
from moejax.interop.save import write_folder
from moejax.models import transformer, zoo
from moejax.models.loss import loss_fn

# Both sides compute in float32 and sum in different orders. Logits are near 1 and three layers deep:
# the differences seen are below 1e-5, a wrong term is above 1e-2.
LOGITS = 1e-4
NEW_TOKENS = 32


def rows(case: Case):
    """Tokens [3, length], and how many of each row are real where rows are padded."""
    tokens = np.random.default_rng(0).integers(0, 101, (3, case.length))
    return tokens, np.array([case.length, 7 * case.length // 13, 1])


def each(cases: list[Case]):
    """All tests of a model follow each other, so that of several workers one builds it."""
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.id, scope="module")


every_case = each(CASES)


class Pair(NamedTuple):
    """One model twice: `original` (torch), and what moejax read from its files."""

    original: torch.nn.Module
    cfg: ModelConfig
    objective: ObjectiveConfig
    params: Any
    router_state: Any
    forward: Any


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory, record_one):
    """`pair_of(case)`: made once per session."""

    @functools.cache
    def one(case: Case) -> Pair:
        original = oracle.build(case)
        path = tmp_path_factory.mktemp("original") / case.id
        oracle.save(original, case, path)
        assert (len(list(path.glob("*.safetensors"))) > 1) == (case.shard is not None)
        cfg, params, state = load_model(path)
        objective = zoo.objective_from_hf(open_folder(path).hf)
        record_one(case.family, "configurations")

        @jax.jit
        def forward(tokens, positions, segments):
            out = transformer.forward(
                params, state, tokens, cfg, positions_BS=positions, segment_ids_BS=segments
            )
            routes = [a.routing.expert_index_TK for a in out.aux.values()]
            return transformer.logits(params, out.hidden_BSD), routes

        return Pair(original, cfg, objective, params, state, forward)

    return one


def run_original(original, tokens, mask, positions=None):
    """(logits, [routes sorted within each token]) of the original."""
    extra = {} if positions is None else {"position_ids": torch.tensor(positions)}
    with torch.no_grad(), oracle.watch_routes(original) as seen:
        out = original(torch.tensor(tokens), attention_mask=torch.tensor(mask), **extra)
    return out.logits.numpy(), [np.sort(s.numpy(), axis=-1) for s in seen]


def compare(pair: Pair, tokens, mask, positions):
    """Largest difference of the logits of real tokens, and the number of equal routes."""
    want, want_routes = run_original(pair.original, tokens, mask, positions)
    got, routes = pair.forward(
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(positions, jnp.int32),
        jnp.asarray(mask, jnp.int32),
    )
    real = mask.astype(bool)
    routes_LTK = np.concatenate(routes) if routes else np.zeros((0, mask.size, 1))
    assert len(want_routes) == len(routes_LTK) == pair.cfg.num_moe_layers
    for want_TK, got_TK in zip(want_routes, routes_LTK):
        np.testing.assert_array_equal(np.sort(got_TK, axis=-1)[real.ravel()], want_TK[real.ravel()])
    return np.abs(np.asarray(got) - want)[real].max(), routes_LTK[:, real.ravel()].size


@every_case
def test_logits_and_routes(case, pair_of, record, record_one):
    pair, (tokens, _) = pair_of(case), rows(case)
    positions = np.broadcast_to(np.arange(case.length), tokens.shape)
    mask = np.ones_like(tokens)
    difference, routes = compare(pair, tokens, mask, positions)
    record(case.family, "logits", difference)
    record_one(case.family, "routes equal", routes)
    assert difference <= LOGITS
    scale = run_original(pair.original, tokens, mask)[0].std()
    assert 0.5 < scale < 2  # the tolerance is absolute: it means something at this scale


@every_case
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batch(case, side, pair_of, record):
    if side == "left" and not case.pads_left:
        pytest.skip("the original reads padding before a row")
    tokens, lengths = rows(case)
    pad = (case.length - lengths)[:, None] if side == "left" else np.zeros((3, 1), int)
    positions = np.arange(case.length)[None] - pad
    mask = ((positions >= 0) & (positions < lengths[:, None])).astype(int)
    difference, _ = compare(pair_of(case), tokens * mask, mask, positions.clip(0))
    record(case.family, "padded", difference)
    assert difference <= LOGITS


def continued(original, prompts):
    """Greedy continuations of the original, of prompts padded on the left."""
    width = max(map(len, prompts))
    padded = np.array([[0] * (width - len(p)) + p for p in prompts])
    mask = np.array([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    tokens = original.generate(
        torch.tensor(padded),
        attention_mask=torch.tensor(mask),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return tokens[:, width:].numpy()


@every_case
def test_greedy_continuation(case, pair_of, record_one):
    """Prefill and cached decoding of a padded batch: the same 32 tokens for every prompt."""
    pair = pair_of(case)
    prompts = [row[:n].tolist() for row, n in zip(*rows(case))]
    if case.pads_left:
        want = continued(pair.original, prompts)
    else:
        want = np.concatenate([continued(pair.original, [prompt]) for prompt in prompts])
    got = np.array(generate(pair.params, pair.router_state, pair.cfg, prompts, NEW_TOKENS))
    np.testing.assert_array_equal(got, want)
    record_one(case.family, "tokens equal", got.size)


@each([c for c in CASES if c.gradient])
def test_gradient(case, pair_of, record, tmp_path):
    """d loss / d weight, written in the published layout by both sides, tensor by tensor."""
    pair, (tokens, lengths) = pair_of(case), rows(case)
    positions = np.broadcast_to(np.arange(case.length), tokens.shape)
    segments = (positions < lengths[:, None]).astype(np.int32)
    targets = np.roll(tokens, -1, axis=1)
    counted = (positions + 1 < lengths[:, None]).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": targets,
        "positions": positions,
        "segment_ids": segments,
        "loss_mask": counted,
    }
    batch = {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}
    loss_of = functools.partial(loss_fn, cfg=pair.cfg, objective=pair.objective)
    grad = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    (loss, parts), grads = grad(pair.params, pair.router_state, batch)
    assert not parts.balance or max(map(abs, parts.balance.values())) == 0

    logits = pair.original(torch.tensor(tokens), attention_mask=torch.tensor(segments)).logits
    where = torch.tensor(counted, dtype=torch.bool)
    want_loss = torch.nn.functional.cross_entropy(logits[where], torch.tensor(targets)[where])
    np.testing.assert_allclose(loss, want_loss.item(), rtol=1e-5)
    pair.original.zero_grad()
    want_loss.backward()

    holder = oracle.build(case)
    for p, q in zip(holder.parameters(), pair.original.parameters(), strict=True):
        if q.requires_grad:  # else it is what a rule moves, and no gradient
            p.data = torch.zeros_like(p) if q.grad is None else q.grad
    oracle.save(holder, case, tmp_path / "want")
    write_folder(tmp_path / "got", pair.cfg, grads, pair.router_state, case.family)
    want, got = read(tmp_path / "want"), read(tmp_path / "got")
    assert set(want) == set(got)
    for name in want:
        # Relative to the tensor's largest entry: float32 sums over 18 tokens and a few dozen features.
        scale = np.abs(want[name]).max()
        difference = np.abs(got[name] - want[name]).max()
        assert difference <= 1e-4 * scale, (name, difference, scale)
        record(case.family, "gradient", difference)


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


@every_case
def test_export_is_the_original(case, pair_of, tmp_path):
    """What moejax writes, the original reads: every weight to the bit, hence the same logits."""
    pair = pair_of(case)
    out = tmp_path / "export"
    write_folder(out, pair.cfg, pair.params, pair.router_state, case.family)
    again = oracle.load(case, out)
    want, got = pair.original.state_dict(), again.state_dict()
    assert set(want) == set(got)
    for name in want:
        assert torch.equal(want[name], got[name]), name
    tokens, _ = rows(case)
    mask = np.ones_like(tokens)
    want, got = (run_original(m, tokens, mask)[0] for m in (pair.original, again))
    # torch sums in another order where a tensor begins elsewhere in memory.
    np.testing.assert_allclose(got, want, atol=1e-5)

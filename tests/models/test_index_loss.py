"""What teaches an indexer: against float64 NumPy, and that it teaches nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dsa_case import CFG, DENSE, POSITIONS, SEGMENTS, SHARING, S, batch, index_of, weights
from flat import change

from moejax.attention.block_attention import Sight
from moejax.attention.index_loss import index_loss
from moejax.attention.selection import Index, choose, chosen
from moejax.config import ExperimentConfig, ObjectiveConfig
from moejax.config_checks import experiment_problems, model_problems
from moejax.models import transformer
from moejax.models.loss import loss_fn
from moejax.params import by_path

SPARSE = ObjectiveConfig(index_loss=0.5)
WARM_UP = dataclasses.replace(SPARSE, index_dense=True)
MASK = np.asarray(SEGMENTS > 0)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def by_hand(index, q, k, scale, seen_BST):
    """The loss and its gradients by the indexer's parts, query by query; d KL / d I = softmax(I) - p."""
    loss, grads = 0.0, [np.zeros_like(a) for a in index]
    iq, iw, ik = index
    for b, t in zip(*np.nonzero(MASK)):
        at = np.nonzero(seen_BST[b, t])[0]
        heads = range(q.shape[2])
        p = sum(softmax(k[b, n, at] @ q[b, t, n] * scale) for n in heads) / len(heads)
        dots = iq[b, t] @ ik[b, at].T  # J by keys
        got = softmax(iw[b, t] @ np.maximum(dots, 0))
        loss += (p * np.log(p / got)).sum()
        d = got - p
        on = (dots > 0) * d * iw[b, t][:, None]
        grads[0][b, t] += on @ ik[b, at]
        grads[1][b, t] += np.maximum(dots, 0) @ d
        grads[2][b, at] += on.T @ iq[b, t]
    return loss, grads


@pytest.mark.parametrize("topk", [4, None], ids=["sparse", "dense"])
@pytest.mark.parametrize("block", [0, 3])
def test_loss_and_gradients_by_hand(topk, block):
    """Two documents and padding; a query that sees fewer keys than it may choose; large weights."""
    with jax.enable_x64(True):
        draw = lambda i, *shape: 2 * jax.random.normal(jax.random.key(i), (2, *shape), "float64")  # noqa: E731
        index = Index(*(2 * a.astype("float64") for a in index_of(3)))
        q, k = draw(0, S, 2, 5), draw(1, 2, S, 5)
        sight = Sight(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)
        if topk:
            sight = sight._replace(chosen=chosen(choose(index, sight, topk), S))
        of = lambda index, q, k: index_loss(index, q, k, 0.4, sight, jnp.asarray(MASK), block)  # noqa: E731
        loss, (d_index, *rest) = jax.value_and_grad(of, argnums=(0, 1, 2))(index, q, k)
        seen = np.asarray(sight.mask_BST())
    want, grads = by_hand([np.asarray(a) for a in index], np.asarray(q), np.asarray(k), 0.4, seen)
    # float64, sums of a hundred terms of order 1.
    np.testing.assert_allclose(loss, want, rtol=1e-10)
    for got, grad in zip(d_index, grads):
        np.testing.assert_allclose(got, grad, rtol=1e-9, atol=1e-11)
    assert not any(np.any(a) for a in rest)  # attention is the teacher


@functools.partial(jax.jit, static_argnames=("cfg", "objective", "apart"))
def gradients(params, state, cfg, objective, apart):
    """Of the loss of attention alone, or of the rest alone."""

    def of(params):
        loss, parts = loss_fn(params, state, batch(), cfg, objective=objective, compute=DENSE)
        index = parts.attention["index"]
        return (index if apart else loss - index), index

    return jax.grad(of, has_aux=True)(params)


@pytest.mark.parametrize(
    "objective",
    [SPARSE, pytest.param(WARM_UP, marks=pytest.mark.product)],
    ids=["sparse", "warm-up"],
)
def test_gradients_are_separate(objective):
    """The indexer learns from its loss and from nothing else, and nothing else from it."""
    cfg = dataclasses.replace(SHARING, mtp_depth=1)
    model = weights(cfg)
    alone, index = gradients(*model, cfg, objective, True)
    others, _ = gradients(*model, cfg, objective, False)
    assert index > 0
    paths = by_path(alone)
    indexers = {path for path in paths if "/indexer/" in path}
    assert len(indexers) == 2 * 5  # of the trunk and of multi-token prediction
    assert {path for path, g in paths.items() if np.any(np.asarray(g))} == indexers
    rest = {path for path, g in by_path(others).items() if np.any(np.asarray(g))}
    assert not rest & indexers and len(rest) > 20


def test_the_warm_up_sees_all_keys():
    """Its cross-entropy is that of latent attention."""
    params, state = weights(CFG)
    mla = dataclasses.replace(CFG, attention=dataclasses.replace(CFG.attention, kind="mla"))
    rest = {k: v for k, v in params.items() if k != "indexed_attn"}

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def of(params, cfg, objective):
        how = dict(objective=objective, compute=DENSE)
        return loss_fn(params, state, batch(), cfg, **how)[1].cross_entropy

    want = of(rest, mla, ObjectiveConfig())
    np.testing.assert_allclose(of(params, CFG, WARM_UP), want, rtol=1e-6)  # float32
    assert abs(of(params, CFG, SPARSE) - want) > 1e-3


def test_an_indexer_learns():
    """Plain descent on its loss: scores come nearer to attention's weights."""
    params, state = weights(CFG)
    losses = []
    for _ in range(12):
        grads, index = gradients(params, state, CFG, WARM_UP, True)
        params = jax.tree.map(lambda p, g: p - 2.0 * g, params, grads)
        losses.append(float(index))
    assert losses[-1] < 0.6 * losses[0]


def test_the_rest_is_frozen_by_groups():
    groups = ("path=* frozen", "path=*/indexer/* trained")
    cfg = change(ExperimentConfig(model=CFG, objective=WARM_UP), groups=groups, seq_len=8)
    assert not experiment_problems(cfg)
    roles = {path: spec.role for path, spec in by_path(transformer.param_specs(CFG)).items()}
    trained = {path for path, t in cfg.optimizer.treatments(roles).items() if not t.frozen}
    assert trained == {path for path in roles if "/indexer/" in path}


def test_what_does_not_fit():
    mla = dataclasses.replace(CFG, attention=dataclasses.replace(CFG.attention, kind="mla"))
    said = "objective.index_loss=0.5 is not read by model.attention.kind='mla': leave it at 0.0"
    assert said in model_problems(mla, objective=SPARSE)
    alone = ObjectiveConfig(index_dense=True)
    assert any(
        "index_dense needs objective.index_loss > 0" in p
        for p in model_problems(CFG, objective=alone)
    )

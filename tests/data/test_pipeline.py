"""Batches: packing loses and crosses nothing; mixing, epochs, processes and exact resume."""

import collections
import dataclasses
import itertools
import json
import zlib

import numpy as np
import pytest

from moejax.config import DataConfig
from moejax.data.corpus import Corpus
from moejax.data.pipeline import PackedRows, synthetic_batch, train_iterator, validation_batches
from moejax.data.sources import DataError, Document
from moejax.data.tokenizer import ByteTokenizer
from moejax.data.tokens import Tokens

KEYS = {"tokens", "targets", "segment_ids", "positions", "loss_mask", "domain"}
TOKENIZER = ByteTokenizer()
BOS, EOS, PAD = TOKENIZER.bos_id, TOKENIZER.eos_id, TOKENIZER.pad_id


def documents(domain, lengths):
    """Texts whose characters tell the domain and the document apart."""
    return tuple(
        Document(domain, i + 1, domain + chr(0x100 + i) * n) for i, n in enumerate(lengths)
    )


def make_corpus(weights=(0.5, 0.3, 0.2), copies=1):
    train = {
        "a": documents("a", [3, 50, 1, 12, 7] * copies),
        "b": documents("b", [20, 20, 4] * copies),
        "c": documents("c", [9, 2] * copies),
    }
    validation = {"a": documents("a", [5, 40]), "b": documents("b", [8]), "c": documents("c", [1])}
    return Corpus(train, validation, weights, {})


CFG = DataConfig(seq_len=16, batch_size=4, seed=3)


def rows_of(batches):
    """The rows of some batches, one by one."""
    for batch in batches:
        for b in range(len(batch["tokens"])):
            yield {k: v[b] for k, v in batch.items()}


def check_row(row):
    """Everything that holds of a single row of a valid batch (DESIGN.md, Batch)."""
    segments, mask = row["segment_ids"], row["loss_mask"]
    assert set(row) - {"num_bytes"} == KEYS and all(v.dtype == np.int32 for v in row.values())
    np.testing.assert_array_equal(mask, segments > 0)
    used = int(mask.sum())
    assert mask[:used].all()  # padding comes last
    for key in ("positions", "segment_ids"):
        assert not row[key][used:].any()
    if used:
        assert segments[0] == 1 and set(np.diff(segments[:used])) <= {0, 1}
        new = np.r_[True, np.diff(segments[:used]) > 0]
        starts = np.flatnonzero(new)
        expected = np.arange(used) - np.repeat(starts, np.diff(np.r_[starts, used]))
        np.testing.assert_array_equal(row["positions"][:used], expected)
        # Within a segment the target is the next token.
        inner = ~new[1:]
        following = row["tokens"][1:used]
        np.testing.assert_array_equal(row["targets"][: used - 1][inner], following[inner])
    return used


def pack(texts, seq_len):
    ids = [np.array(TOKENIZER.encode(t), np.uint16) for t in texts]
    tokens = Tokens(np.concatenate(ids), np.cumsum([len(i) for i in ids]))
    return PackedRows(tokens, 7, TOKENIZER, seq_len)


def test_packing_by_hand():
    rows = pack(["ab", "cdefg", ""], seq_len=4)
    a, b, c, d, e, f, g = b"abcdefg"
    expected = [
        # tokens, targets, segment_ids, positions, loss_mask
        ([BOS, a, b, BOS], [a, b, EOS, c], [1, 1, 1, 2], [0, 1, 2, 0], [1, 1, 1, 1]),
        # The long document goes on: its first token here was the last target above.
        ([c, d, e, f], [d, e, f, g], [1, 1, 1, 1], [0, 1, 2, 3], [1, 1, 1, 1]),
        ([g, BOS, PAD, PAD], [EOS, EOS, PAD, PAD], [1, 2, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]),
    ]
    assert len(rows) == 3
    for i, want in enumerate(expected):
        row = rows[i]
        got = [row[k] for k in ("tokens", "targets", "segment_ids", "positions", "loss_mask")]
        assert [x.tolist() for x in got] == list(want)
        assert row["domain"].tolist() == [7] * 4


@pytest.mark.parametrize("seq_len", [1, 2, 3, 5, 8, 64])
def test_packing_loses_no_target(seq_len):
    """The targets of all rows, laid end to end, are the texts and their ends."""
    texts = ["hello", "", "a longer text than the rows", "x" * 16, "yz"]
    packed = pack(texts, seq_len)
    rows = [packed[i] for i in range(len(packed))]
    targets = [t for row in rows for t in row["targets"][row["loss_mask"] == 1].tolist()]
    assert targets == [t for text in texts for t in (*TOKENIZER.encode(text), EOS)]
    for row in rows:
        check_row(row)
    assert all(row["loss_mask"].all() for row in rows[:-1])  # only the last row is padded


def test_train_batches_are_valid():
    iterator = train_iterator(make_corpus(), TOKENIZER, CFG)
    batches = list(itertools.islice(iterator, 20))
    assert all(v.shape == (4, 16) for b in batches for v in b.values())
    for row in rows_of(batches):
        assert check_row(row) > 0
        assert len(set(row["domain"].tolist())) == 1
        named = ord("abc"[row["domain"][0]])
        assert set(row["targets"].tolist()) & set(b"abc") <= {named}


def test_an_epoch_of_a_domain_holds_every_target_once():
    corpus = make_corpus(weights=(1.0, 0.0, 0.0))
    want = collections.Counter()
    for document in corpus.train["a"]:
        want.update(TOKENIZER.encode(document.text) + [EOS])
    num_rows = -(-sum(want.values()) // CFG.seq_len)
    iterator = train_iterator(corpus, TOKENIZER, dataclasses.replace(CFG, batch_size=num_rows))
    epochs = [next(iterator) for _ in range(3)]
    for batch in epochs:
        got = collections.Counter(batch["targets"][batch["loss_mask"] == 1].tolist())
        assert got == want
    orders = {batch["tokens"].tobytes() for batch in epochs}
    assert len(orders) == 3  # shuffled anew


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (0.98, 0.01, 0.01), (0.6, 0.0, 0.4)])
def test_mixing_follows_weights(weights):
    # Many rows, because grain's shuffle takes milliseconds per row of a domain of a few.
    iterator = train_iterator(make_corpus(weights, copies=100), TOKENIZER, CFG)
    counts = np.zeros(3)
    for batch in itertools.islice(iterator, 500):
        counts += np.bincount(batch["domain"][:, 0], minlength=3)
    # Of 2000 rows, a prefix of grain's mix is within about a row of its proportions, which are the
    # weights rounded to 1%.
    np.testing.assert_allclose(counts / counts.sum(), weights, rtol=0.01, atol=0.001)


def test_deterministic_in_the_seed():
    def first(seed):
        iterator = train_iterator(make_corpus(), TOKENIZER, dataclasses.replace(CFG, seed=seed))
        return np.stack([next(iterator)["tokens"] for _ in range(5)])

    np.testing.assert_array_equal(first(3), first(3))
    assert (first(3) != first(4)).any()


@pytest.mark.parametrize("steps", [0, 1, 7, 40])
def test_resume_at_the_exact_batch(steps):
    """40 batches are several epochs of every domain."""
    iterator = train_iterator(make_corpus(), TOKENIZER, CFG)
    for _ in range(steps):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    want = [next(iterator) for _ in range(10)]
    resumed = train_iterator(make_corpus(), TOKENIZER, CFG)
    next(resumed)  # restoring works from any position
    resumed.set_state(state)
    for batch in want:
        got = next(resumed)
        assert set(got) == KEYS
        for key in KEYS:
            np.testing.assert_array_equal(got[key], batch[key])


def test_processes_share_the_global_batch():
    whole = train_iterator(make_corpus(), TOKENIZER, CFG)
    parts = [
        train_iterator(make_corpus(), TOKENIZER, CFG, process_index=p, process_count=2)
        for p in range(2)
    ]
    for _ in range(10):
        batch = next(whole)
        halves = [next(part) for part in parts]
        for key in KEYS:
            np.testing.assert_array_equal(np.concatenate([h[key] for h in halves]), batch[key])
    with pytest.raises(DataError, match=r"data.batch_size=4 must be a multiple of 3 processes: 3"):
        train_iterator(make_corpus(), TOKENIZER, CFG, process_count=3)


def test_validation_is_one_pass_over_everything():
    corpus = make_corpus()
    batches = validation_batches(corpus, TOKENIZER, CFG)
    assert all(v.shape == (4, 16) for b in batches for v in b.values())
    rows = list(rows_of(batches))
    got, num_bytes = collections.Counter(), 0
    for row in rows:
        check_row(row)
        targets = row["targets"][row["loss_mask"] == 1]
        got.update((int(d), int(t)) for d, t in zip(row["domain"], targets))
        num_bytes += row["num_bytes"].sum()
    want = collections.Counter()
    for i, domain in enumerate(corpus.domains):
        for document in corpus.validation[domain]:
            want.update((i, t) for t in TOKENIZER.encode(document.text) + [EOS])
    assert got == want
    assert num_bytes == sum(
        len(d.text.encode()) for docs in corpus.validation.values() for d in docs
    )
    assert not rows[-1]["loss_mask"].any()  # the last batch is filled up
    assert {int(row["domain"][0]) for row in rows[:3]} == {0, 1, 2}


def test_validation_is_a_fixed_sequence():
    batches = validation_batches(make_corpus(), TOKENIZER, CFG)
    first, second = list(batches), list(batches)
    assert len(first) == len(batches) == 3
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
    some = validation_batches(make_corpus(), TOKENIZER, CFG, 8)
    assert len(some) == 2
    np.testing.assert_array_equal(some[1]["tokens"], first[1]["tokens"])
    assert len(validation_batches(make_corpus(), TOKENIZER, CFG, 400)) == 3


def concatenated(batches):
    rows = [row for row in rows_of(batches) if row["loss_mask"].any()]
    return {k: np.stack([row[k] for row in rows]) for k in (*KEYS, "num_bytes")}


def test_validation_knows_no_seed_no_order_of_files_and_no_batch_size():
    corpus = make_corpus()
    want = concatenated(validation_batches(corpus, TOKENIZER, CFG))
    turned = {name: documents[::-1] for name, documents in corpus.validation.items()}
    for other, changes, num_rows in [
        (corpus, {"seed": 99}, None),
        (dataclasses.replace(corpus, validation=turned), {}, None),
        (corpus, {"batch_size": 3}, None),
        (corpus, {"batch_size": 2, "seed": 1}, 3),
    ]:
        cfg = dataclasses.replace(CFG, **changes)
        got = concatenated(validation_batches(other, TOKENIZER, cfg, num_rows))
        for key, value in got.items():
            np.testing.assert_array_equal(value, want[key][:num_rows])


def test_training_order_is_that_of_0_1_0():
    """A resumed run of 0.1.0 sees the batches it would have seen: sums of the first five, from 0.1.0."""
    iterator = train_iterator(make_corpus(), TOKENIZER, CFG)
    sums = [zlib.crc32(next(iterator)["tokens"].tobytes()) for _ in range(5)]
    assert sums == [3632337636, 3716194620, 3512557134, 3927195776, 2001738455]


def test_validation_processes_share_the_batch():
    whole = validation_batches(make_corpus(), TOKENIZER, CFG)
    parts = [
        validation_batches(make_corpus(), TOKENIZER, CFG, process_index=p, process_count=2)
        for p in range(2)
    ]
    assert [len(part) for part in parts] == [len(whole)] * 2
    for i in range(len(whole)):
        halves = np.concatenate([part[i]["targets"] for part in parts])
        np.testing.assert_array_equal(halves, whole[i]["targets"])


@pytest.mark.parametrize("seq_len, batch_size", [(64, 8), (1, 2), (8, 3)])
def test_synthetic_batch_is_valid(seq_len, batch_size):
    batch = synthetic_batch(seq_len, batch_size, vocab_size=50, seed=1)
    assert all(v.shape == (batch_size, seq_len) for v in batch.values())
    used = [check_row(row) for row in rows_of([batch])]
    assert min(used) > 0
    for key in ("tokens", "targets"):
        assert batch[key].min() >= 0 and batch[key].max() < 50
    again = synthetic_batch(seq_len, batch_size, vocab_size=50, seed=1)
    np.testing.assert_array_equal(batch["tokens"], again["tokens"])
    if seq_len == 64:
        assert min(used) < 64 and batch["segment_ids"].max() > 1

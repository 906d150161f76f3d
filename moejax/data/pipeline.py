"""Turns documents into batches with grain: tokenise once, pack, shuffle, mix, batch.

A document t_1..t_n becomes n + 1 tokens `bos t_1 .. t_n` with targets `t_1 .. t_n eos`: every token
of every text, and its end, is predicted exactly once. The documents of a domain are laid end
to end in an order fixed by the seed and cut into rows of `seq_len`; the last row is padded. A row
holds one domain.

A document that does not fit in a row continues in another row as a new segment: its positions start at 0
and it does not see its earlier part. Its first token there is the target of the last token of the earlier
part, so no target is lost. Targets never cross documents.

Each epoch of a domain shuffles its rows anew. The row at position i depends only on (seed, corpus, i), so
the state of an iterator is one number, and any position can be restored.

Held-out documents do not depend on the seed: they are sorted by their hashes. Their batches have one more
field, `num_bytes`: the bytes of text that each target stands for (see `Counted`), 0 for padding. If a
document is cut, by the end of a row or of the evaluated text, bytes count up to the last predicted token,
so loss and bytes always belong to the same text.
"""

import time
import zlib
from collections.abc import Callable

import grain
import numpy as np

from moejax.config import DataConfig
from moejax.data import texts
from moejax.data.corpus import Corpus
from moejax.data.sources import DataError
from moejax.data.tokenizer import Tokenizer
from moejax.data.tokens import Tokens, tokenize
from moejax.text import seconds_text

Batch = dict[str, np.ndarray]


class PackedRows:
    """Rows of one domain, as a random-access source of grain: `rows[i]` is a dict of int32 arrays
    of shape (seq_len,), see `DESIGN.md`. Reads no more of the tokens than a row needs.

    Args:
      tokens: of all documents. If the bytes of its tokens are known, rows have `num_bytes`.
      domain: number of the domain.
      tokenizer: gives the separators, padding and size of the vocabulary.
      seq_len: row length S.
      order: the documents in the order of packing; None: as they are. Not with bytes.
    """

    def __init__(
        self,
        tokens: Tokens,
        domain: int,
        tokenizer: Tokenizer,
        seq_len: int,
        order: np.ndarray | None = None,
    ):
        assert order is None or tokens.num_bytes is None
        self._seq_len, self._domain = seq_len, domain
        self._bos_id, self._eos_id, self._pad_id = (
            tokenizer.bos_id,
            tokenizer.eos_id,
            tokenizer.pad_id,
        )
        self._ids, self._bytes = tokens.ids, tokens.num_bytes
        lengths, self._first_ids = np.diff(tokens.ends, prepend=0), tokens.ends
        if order is not None:
            lengths, self._first_ids = lengths[order], tokens.ends[order]
        self._first_ids = self._first_ids - lengths  # of each document, in ids
        # Where documents begin and end among the packed tokens, each with its separator.
        self._ends = np.cumsum(lengths + 1)
        self._starts = self._ends - lengths - 1

    def __len__(self) -> int:
        return -(-int(self._ends[-1]) // self._seq_len)

    def __getitem__(self, row: int) -> Batch:
        begin = row * self._seq_len
        end = min(begin + self._seq_len, int(self._ends[-1]))
        n = end - begin
        first = np.searchsorted(self._ends, begin, side="right")  # the document of the first token
        last = np.searchsorted(self._starts, end)  # one past that of the last
        segment_starts = np.maximum(self._starts[first:last] - begin, 0)
        document_ends = self._ends[first:last]
        document_ends = document_ends[document_ends <= end] - begin - 1

        out = _empty_rows((self._seq_len,), self._pad_id, self._domain)
        packed = self._packed(begin, min(end + 1, int(self._ends[-1])), int(first))
        out["tokens"][:n] = packed[:n]
        out["targets"][: len(packed) - 1] = packed[1:]
        out["targets"][document_ends] = self._eos_id
        out["targets"][n:] = self._pad_id
        is_start = np.zeros(n, np.int32)
        is_start[segment_starts] = 1
        out["segment_ids"][:n] = np.cumsum(is_start)
        out["positions"][:n] = np.arange(n) - segment_starts[out["segment_ids"][:n] - 1]
        out["loss_mask"][:n] = 1
        if self._bytes is not None:
            out["num_bytes"] = np.zeros(self._seq_len, np.int32)
            out["num_bytes"][:n] = self._bytes[begin:end]
        return out

    def _packed(self, begin: int, end: int, document: int) -> np.ndarray:
        """The packed tokens from `begin`, which is in `document`, to `end`."""
        out = np.full(end - begin, self._bos_id, np.int32)
        at = begin
        while at < end:
            start, stop = int(self._starts[document]) + 1, min(int(self._ends[document]), end)
            at = max(at, start)  # behind the separator
            shift = int(self._first_ids[document]) - start
            if at < stop:
                out[at - begin : stop - begin] = self._ids[at + shift : stop + shift]
            at, document = stop, document + 1
        return out


def _empty_rows(shape: tuple[int, ...], pad_id: int, domain: int) -> Batch:
    """Rows that are all padding."""
    fill = {"tokens": pad_id, "targets": pad_id, "segment_ids": 0, "positions": 0, "loss_mask": 0}
    return {k: np.full(shape, v, np.int32) for k, v in fill.items()} | {
        "domain": np.full(shape, domain, np.int32)
    }


def train_iterator(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cfg: DataConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
    say: Callable[[str], object] = lambda line: None,
) -> grain.DatasetIterator:
    """Endless training batches: dicts of int32 arrays of shape (batch_size / process_count,
    seq_len).

    The batches of all processes, concatenated in their order, are the batch of a single process.
    Domains are mixed row by row in fixed proportions (`corpus.weights`, within 1%). A domain of weight 0 is
    left out.

    Tokens are kept in `corpus.cache`, if there is one; a line to `say` tells of those that were there.

    The iterator's `get_state()` is JSON-serialisable. Give it to `set_state` of an iterator made from the same
    corpus, tokenizer and config, and the same batches follow.
    """
    local = _local_batch_size(cfg, process_count)
    datasets, weights, found = [], [], {}
    for index, (name, weight) in enumerate(zip(corpus.domains, corpus.weights)):
        if not weight:
            continue
        tokens = tokenize(corpus.train[name], tokenizer, name, corpus.cache)
        if tokens.made is not None:
            found[name] = tokens.made
        seed = zlib.crc32(f"{cfg.seed}/{name}".encode())
        order = np.random.default_rng(seed).permutation(len(tokens.ends))
        rows = PackedRows(tokens, index, tokenizer, cfg.seq_len, order)
        datasets.append(grain.MapDataset.source(rows).shuffle(seed=seed).repeat())
        weights.append(weight)
    if found:
        age = seconds_text(max(time.time() - min(found.values()), 0))
        say(f"tokens of {', '.join(found)}: read from {corpus.cache}, prepared {age} ago")
    mixed = grain.MapDataset.mix(datasets, weights)
    # Local batch number j of the whole stream belongs to process j mod process_count.
    mine = mixed.batch(local, drop_remainder=True)[process_index::process_count]
    # One thread stays a few batches ahead; building a row takes tens of microseconds.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(mine.to_iter_dataset(options))


def _local_batch_size(cfg: DataConfig, process_count: int) -> int:
    if cfg.batch_size % process_count:
        near = max(cfg.batch_size // process_count, 1) * process_count
        raise DataError(
            f"data.batch_size={cfg.batch_size} must be a multiple of {process_count} processes: "
            f"{near} would work"
        )
    return cfg.batch_size // process_count


class _ValidationRows:
    """The rows of all domains in one fixed order, padded to whole batches.

    Row r of a domain with n rows is placed at the fraction r / n, so the first batches, however many, hold the
    domains in proportion, and the first rows are one of each domain.
    """

    def __init__(
        self, domains: list[PackedRows], num_rows: int | None, batch_size: int, padding: Batch
    ):
        sizes = [len(rows) for rows in domains]
        # No domain has more among the first `num_rows` than that many.
        parts = [n if num_rows is None else min(n, num_rows) for n in sizes]
        where = np.concatenate([np.arange(part) / n for part, n in zip(parts, sizes)])
        # Equal fractions: in the order of the domains.
        self._index = np.argsort(where, kind="stable")[:num_rows]
        self._ends = np.cumsum(parts)
        self._domains, self._padding = domains, padding
        self._length = -(-len(self._index) // batch_size) * batch_size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Batch:
        if i >= len(self._index):
            return self._padding
        domain = np.searchsorted(self._ends, self._index[i], side="right")
        row = self._index[i] - (self._ends[domain - 1] if domain else 0)
        return self._domains[domain][int(row)]


def validation_batches(
    corpus: Corpus,
    tokenizer: Tokenizer,
    cfg: DataConfig,
    num_rows: int | None = None,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.MapDataset:
    """The first `num_rows` (None: all) rows of the validation documents, as a sequence of batches.

    `len`, `[i]` and iteration work any number of times. Call it once, keep the result. The order depends on the
    documents' content alone, not on a seed, the order of files or the batch size, and mixes the domains
    by size. The last batch is padded (`loss_mask` 0). Shapes and processes are as for `train_iterator`,
    with the additional field `num_bytes`.
    """
    local = _local_batch_size(cfg, process_count)
    domains = []
    for index, name in enumerate(corpus.domains):
        documents = texts.by_digest(corpus.validation[name])
        tokens = tokenize(documents, tokenizer, name, corpus.cache, count_bytes=True)
        domains.append(PackedRows(tokens, index, tokenizer, cfg.seq_len))
    padding = _empty_rows((cfg.seq_len,), tokenizer.pad_id, 0)
    padding["num_bytes"] = np.zeros(cfg.seq_len, np.int32)
    rows = _ValidationRows(domains, num_rows, cfg.batch_size, padding)
    return grain.MapDataset.source(rows).batch(local)[process_index::process_count]


def synthetic_batch(seq_len: int, batch_size: int, vocab_size: int, seed: int = 0) -> Batch:
    """A valid packed batch of random tokens, shapes (batch_size, seq_len), for tests and
    benchmarks.

    Each row holds documents of random length and ends in padding (up to an eighth of the row, never
    the whole row). There are three domains. Token 0 is both separator and padding.
    """
    rng = np.random.default_rng(seed)
    batch = _empty_rows((batch_size, seq_len), 0, 0)
    batch["domain"] += rng.integers(0, 3, (batch_size, 1), np.int32)
    for b in range(batch_size):
        used = seq_len - int(rng.integers(0, seq_len // 8 + 1))
        cuts = np.flatnonzero(rng.random(used - 1) < 4 / seq_len) + 1
        starts = np.array([0, *cuts])
        ends = np.array([*cuts, used])
        ids = rng.integers(1, vocab_size, used + 1)
        ids[starts] = 0
        batch["tokens"][b, :used] = ids[:-1]
        batch["targets"][b, :used] = ids[1:]
        batch["targets"][b, ends - 1] = 0
        batch["segment_ids"][b, :used] = np.repeat(np.arange(len(starts)) + 1, ends - starts)
        batch["positions"][b, :used] = np.arange(used) - np.repeat(starts, ends - starts)
        batch["loss_mask"][b, :used] = 1
    return batch

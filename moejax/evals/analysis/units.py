"""What the text is like, known before a model reads it: stretches of rows, and the frequent tokens."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

FOLDS = 8  # parts of the text for intervals
UNITS = 64  # about so many stretches of equal length, each of one domain
ROOM = 128  # for units in arrays, so that their shapes, and what is compiled, do not depend on the text
MOST_TOKENS = 4096  # vocabulary entries that are counted one by one
MOST_COUNTS = 2**25  # of them times folds, layers and experts


class Units(NamedTuple):
    """Attributes:
    domain_U: the domain of each unit: a stretch of rows that follow each other in one domain.
    rows_d: rows of each domain, here d.
    frequent: vocabulary entries by falling frequency in this text, those that are counted one by one.
    bin_V: the place of each entry in `frequent`; of all others, `num_bins` - 1.
    num_bins: one more than the most entries that can be in `frequent`.
    """

    domain_U: np.ndarray
    rows_d: np.ndarray
    frequent: np.ndarray
    bin_V: np.ndarray
    num_bins: int

    @property
    def room(self) -> int:
        """Units that arrays have room for; those past the end of `domain_U` stay empty."""
        return max(ROOM, len(self.domain_U))

    @property
    def fold_U(self) -> np.ndarray:
        """The fold of each unit: neighbours are in different ones."""
        return np.arange(len(self.domain_U)) % FOLDS

    def of_rows(self, batches: Iterable[dict]) -> Iterator[tuple[dict, np.ndarray]]:
        """Each batch, in the order in which it was looked through, and the unit of each of its rows."""
        first_d = np.searchsorted(self.domain_U, np.arange(len(self.rows_d)))
        units_d = np.bincount(self.domain_U, minlength=len(self.rows_d))
        seen_d = np.zeros_like(self.rows_d)
        for batch in batches:
            unit_B = np.zeros(len(batch["domain"]), np.int32)
            for row, d in enumerate(batch["domain"][:, 0]):
                if batch["segment_ids"][row].any():
                    unit_B[row] = first_d[d] + seen_d[d] * units_d[d] // self.rows_d[d]
                    seen_d[d] += 1
            yield batch, unit_B


def look_through(
    batches: Iterable[dict], num_domains: int, vocab_size: int, counts_per_token: int
) -> Units:
    """`Units` of a text. `counts_per_token`: layers times experts, to bound what is kept."""
    rows_d, seen_V = np.zeros(num_domains, np.int64), np.zeros(vocab_size, np.int64)
    for batch in batches:
        real_BS = batch["segment_ids"] > 0
        np.add.at(rows_d, batch["domain"][real_BS.any(axis=1), 0], 1)
        seen_V += np.bincount(batch["tokens"][real_BS], minlength=vocab_size)
    units_d = np.maximum(np.round(rows_d / max(rows_d.sum() / UNITS, 1)), rows_d > 0).astype(int)
    most = min(vocab_size, MOST_TOKENS, max(16, MOST_COUNTS // (FOLDS * counts_per_token)))
    order = np.argsort(-seen_V, kind="stable")[:most]
    frequent = order[seen_V[order] > 0]
    bin_V = np.full(vocab_size, most, np.int32)
    bin_V[frequent] = np.arange(len(frequent))
    domain_U = np.repeat(np.arange(num_domains), units_d)
    return Units(domain_U, rows_d, frequent, bin_V, most + 1)

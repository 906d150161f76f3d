"""A corpus: named domains of documents, split into training and validation by document.

A hash of a document's content decides on which side it falls. So exact duplicates land on the same side, in
every domain and in any order of the files: no held-out document is trained on.
"""

import dataclasses
import hashlib
import json
import sys
import warnings
from collections.abc import Iterable, Iterator

from moejax.config import DataConfig
from moejax.data import builtin
from moejax.data.sources import DataError, Document, parse_source, read_documents

Documents = tuple[Document, ...]
# With `data.max_bytes`, give up after this many records without text.
_MOST_EMPTY = 1_000_000


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text held in memory.

    Attributes:
      train, validation: the documents of each domain, by its name. Both have the same keys in the same order;
        the position of a key is the number in the `domain` field of batches.
      weights: sampling weight of each domain, in that order; they sum to 1.
      manifest: a JSON-serialisable record of what was read: the Python version; a sha256 and the size of all
        content and of each domain; every file with its number of documents and bytes.
    """

    train: dict[str, Documents]
    validation: dict[str, Documents]
    weights: tuple[float, ...]
    manifest: dict

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.train)


def load_corpus(cfg: DataConfig, *, only_validation: bool = False) -> Corpus:
    """Reads every source of `cfg` and splits it; see `moejax.data.sources` for their syntax.

    `only_validation` splits nothing: all documents are held out, to evaluate a model on them.
    Bytes are UTF-8 bytes of the text. Empty documents are left out. A domain of a single document
    (one long text file) is cut at a line end, its tail held out. Bad records (not JSON, without text,
    not UTF-8) are errors; with `cfg.skip_bad_records` they are skipped, and a warning counts them.

    Raises:
      DataError: bad syntax, two domains with the same name, missing or broken files, nothing to hold out.
    """
    groups = [_source_domains(source, cfg) for source in cfg.sources]
    domains: dict[str, Documents] = {}
    skipped: dict[str, int] | None = {} if cfg.skip_bad_records else None
    for source, group in zip(cfg.sources, groups):
        for name, documents in group.items():
            if name in domains:
                raise DataError(
                    f"data.sources: {source!r}: there is a domain {name!r} already; give this one another name"
                )
            domains[name] = _take(documents, cfg.max_bytes, name, skip=skipped)
    if only_validation:
        train, validation = {name: () for name in domains}, domains
    else:
        train, validation = _split(domains, cfg.validation_fraction)
    used = validation if only_validation else train
    bytes_of = {name: _num_bytes(documents) for name, documents in used.items()}
    if cfg.weights and len(cfg.weights) != len(cfg.sources):
        raise DataError(
            f"data.weights has {len(cfg.weights)} entries for {len(cfg.sources)} data.sources"
        )
    # The weight of a source is shared among its domains by size.
    sizes = [sum(bytes_of[name] for name in group) for group in groups]
    shares = cfg.weights or sizes
    weights = tuple(
        share / sum(shares) * bytes_of[name] / size
        for share, size, group in zip(shares, sizes, groups)
        for name in group
    )
    return Corpus(
        train, validation, weights, _manifest(cfg, train, validation, weights, skipped or {})
    )


def _source_domains(
    source: str, cfg: DataConfig
) -> dict[str, Iterable[Document] | Iterable[Document | DataError]]:
    """The domains of one source and their (unread) documents."""
    if source == "builtin":
        limit = min(cfg.max_bytes or builtin.MAX_BYTES, builtin.MAX_BYTES)
        return {
            name: _take(stream(), limit, name, distinct=True)
            for name, stream in builtin.domains().items()
        }
    name, target = parse_source(source)
    return {name: read_documents(target, cfg.text_field, cfg.max_bytes)}


def _take(
    documents: Iterable[Document | DataError],
    max_bytes: int,
    domain: str,
    *,
    distinct: bool = False,
    skip: dict[str, int] | None = None,
) -> Documents:
    """The first `max_bytes` bytes (0: all) of a domain; the document at the limit is cut.

    A bad record raises its error. If `skip` is given, it is counted there under the domain's name instead, and
    a warning says so.
    """
    taken, total, seen, bad, number = [], 0, set(), [], 0
    for item in _encoded(documents):
        number += 1
        if max_bytes and number - len(taken) > _MOST_EMPTY:
            raise DataError(
                f"data.sources: {_MOST_EMPTY:,} records of domain {domain!r} have no text; "
                "leave their file out"
            )
        if isinstance(item, DataError):
            if skip is None:
                raise item
            bad = bad or [item]
            skip[domain] = skip.get(domain, 0) + 1
            continue
        document, data = item
        if not document.text.strip() or (distinct and document.text in seen):
            continue
        seen.add(document.text if distinct else None)
        if max_bytes and total + len(data) >= max_bytes:
            # 'ignore' drops a character that the limit cuts in half.
            text = data[: max_bytes - total].decode("utf-8", "ignore")
            if text.strip():
                taken.append(dataclasses.replace(document, text=text))
            break
        total += len(data)
        taken.append(document)
    if bad:
        assert skip is not None
        warnings.warn(
            f"data.sources: {skip[domain]} bad records of domain {domain!r} were skipped "
            f"(data.skip_bad_records); the first: {bad[0]}",
            stacklevel=2,
        )
    if not taken:
        raise DataError(f"data.sources: domain {domain!r} has no text: every document is empty")
    return tuple(taken)


def _encoded(
    documents: Iterable[Document | DataError],
) -> Iterator[tuple[Document, bytes] | DataError]:
    for document in documents:
        if isinstance(document, DataError):
            yield document
            continue
        try:
            yield document, document.text.encode()
        except UnicodeEncodeError as e:
            yield DataError(
                f"{document.id}: character {e.start} is {document.text[e.start]!r}, half of a "
                "surrogate pair, which UTF-8 cannot encode; repair the text or leave it out"
            )


def digest(document: Document) -> bytes:
    """The hash of a document's content. It decides whether the document is held out, and its order there."""
    return hashlib.sha256(document.text.encode()).digest()


def _split(
    domains: dict[str, Documents], fraction: float
) -> tuple[dict[str, Documents], dict[str, Documents]]:
    """Split into (train, validation). A document is held out if its hash, read as a number in [0, 1), is below
    `fraction`. A domain without such a document holds out the one with the smallest hash."""
    pairs = {name: _cut(d[0], fraction) for name, d in domains.items() if len(d) == 1}
    digests = {
        name: [digest(document) for document in documents]
        for name, documents in domains.items()
        if name not in pairs
    }
    limit = int(fraction * 2**64)
    held_out = {d for ds in digests.values() for d in ds if int.from_bytes(d[:8]) < limit}
    held_out |= {min(ds) for ds in digests.values() if held_out.isdisjoint(ds)}
    train, validation = {}, {}
    for name, documents in domains.items():
        if name in pairs:
            train[name], validation[name] = pairs[name]
            continue
        sides = [digest in held_out for digest in digests[name]]
        train[name] = tuple(d for d, out in zip(documents, sides) if not out)
        validation[name] = tuple(d for d, out in zip(documents, sides) if out)
        if not train[name]:
            raise DataError(
                f"data.sources: all {len(documents)} documents of domain {name!r} are held out "
                f"for validation (data.validation_fraction={fraction}): they are too few, or all "
                "the same; give it more different documents"
            )
    return train, validation


def _cut(document: Document, fraction: float) -> tuple[Documents, Documents]:
    """Cut a single document into (head, tail) at the first line end inside the held-out fraction."""
    text = document.text
    at = text.find("\n", int(len(text) * (1 - fraction))) + 1
    if not 0 < at < len(text):
        at = min(int(len(text) * (1 - fraction)), len(text) - 1)
    if not text[:at].strip() or not text[at:].strip():
        raise DataError(
            f"{document.id}: the only document of its domain is too short to hold out its end "
            f"({len(text)} characters); give more text"
        )
    return (
        (dataclasses.replace(document, text=text[:at]),),
        (dataclasses.replace(document, text=text[at:]),),
    )


def _num_bytes(documents: Iterable[Document]) -> int:
    return sum(len(d.text.encode()) for d in documents)


def _manifest(cfg, train, validation, weights, skipped) -> dict:
    content = {name: hashlib.sha256() for name in train}
    files: dict[tuple[str, str], dict] = {}
    for domain, document in _all_documents(train, validation):
        content[domain].update(digest(document))
        entry = files.setdefault(
            (domain, document.file),
            {"domain": domain, "file": document.file, "documents": 0, "bytes": 0},
        )
        entry["documents"] += 1
        entry["bytes"] += len(document.text.encode())
    sums = {name: h.hexdigest() for name, h in content.items()}
    return {
        "python": sys.version.split()[0],
        "sources": list(cfg.sources),
        "sha256": hashlib.sha256(json.dumps(sums).encode()).hexdigest(),
        "bytes": sum(f["bytes"] for f in files.values()),
        "domains": {
            name: {
                "sha256": sums[name],
                "weight": weight,
                "train_documents": len(train[name]),
                "train_bytes": _num_bytes(train[name]),
                "validation_documents": len(validation[name]),
                "validation_bytes": _num_bytes(validation[name]),
            }
            for name, weight in zip(train, weights)
        },
        "files": list(files.values()),
        **({"skipped_records": skipped} if skipped else {}),
    }


def _all_documents(train, validation) -> Iterator[tuple[str, Document]]:
    for name in train:
        for document in (*train[name], *validation[name]):
            yield name, document

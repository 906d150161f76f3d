"""A corpus: named domains of documents, split into training and validation by document.

Which side a document falls on depends on its content alone (a hash), so that exact duplicates land
on the same side, in every domain, whatever order the files come in: nothing held out is trained on.
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
# So many records without text end the reading where `data.max_bytes` is to bound it.
_MOST_EMPTY = 1_000_000


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text held in memory.

    Attributes:
      train, validation: documents of each domain, by domain name; both have the same keys in the
        same order, and the position of a domain in it is the number that batches carry as `domain`.
      weights: sampling weight of each domain, in that order; they sum to 1.
      manifest: what was read, for the record of a run (JSON-serialisable): the Python version, a
        sha256 of all content and of each domain's, its size, and every file with its documents and bytes.
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
    not UTF-8) are errors, or with `cfg.skip_bad_records` left out, counted and said in a warning.

    Raises:
      DataError: bad syntax, two domains of one name, no or broken files, nothing to hold out.
    """
    groups = [_source_domains(source, cfg) for source in cfg.sources]
    domains: dict[str, Documents] = {}
    skipped: dict[str, int] | None = {} if cfg.skip_bad_records else None
    for source, group in zip(cfg.sources, groups):
        for name, documents in group.items():
            if name in domains:
                raise DataError(
                    f"data.sources: {source!r} is a second domain {name!r}; give it another name"
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

    A bad record is raised, or, where `skip` is given, counted in it under the domain's name and said.
    """
    taken, total, seen, bad, number = [], 0, set(), [], 0
    for item in _encoded(documents):
        number += 1
        if max_bytes and number - len(taken) > _MOST_EMPTY:
            raise DataError(
                f"data.sources: {_MOST_EMPTY:,} records of domain {domain!r} are without text; "
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
            # 'ignore' drops the half of a character that the cut may leave.
            text = data[: max_bytes - total].decode("utf-8", "ignore")
            if text.strip():
                taken.append(dataclasses.replace(document, text=text))
            break
        total += len(data)
        taken.append(document)
    if bad:
        assert skip is not None
        warnings.warn(
            f"data.sources: {skip[domain]} bad records of domain {domain!r} are left out "
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
                "surrogate pair, and has no UTF-8 form; repair the text or leave it out"
            )


def digest(document: Document) -> bytes:
    """The hash of a document's content, by which it is held out and in whose order it is evaluated."""
    return hashlib.sha256(document.text.encode()).digest()


def _split(
    domains: dict[str, Documents], fraction: float
) -> tuple[dict[str, Documents], dict[str, Documents]]:
    """(train, validation). Held out are the documents whose hash, read as a number in [0, 1), is
    below `fraction`; of a domain with none, the one with the smallest hash."""
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
                f"for validation (data.validation_fraction={fraction}): they are too few, or the "
                "same; it needs more different documents"
            )
    return train, validation


def _cut(document: Document, fraction: float) -> tuple[Documents, Documents]:
    """A single document as (head, tail), cut after the line that reaches into the fraction."""
    text = document.text
    at = text.find("\n", int(len(text) * (1 - fraction))) + 1
    if not 0 < at < len(text):
        at = min(int(len(text) * (1 - fraction)), len(text) - 1)
    if not text[:at].strip() or not text[at:].strip():
        raise DataError(
            f"{document.id}: the only document of its domain is too short to hold out its tail "
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

"""A corpus: named domains of documents, split into training and validation by document.

A hash of a document's content decides on which side it falls. So exact duplicates land on the same side, in
every domain and in any order of the files: no held-out document is trained on.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from moejax.config import DataConfig
from moejax.data import builtin, files, texts
from moejax.data.sources import DataError, Document, parse_source, read_documents
from moejax.data.texts import Documents, Skipped

# With `data.max_bytes`, give up after this many records without text.
_MOST_EMPTY = 1_000_000


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Text in memory, or in a folder of the user's cache.

    Attributes:
      train, validation: the documents of each domain, by its name. Both have the same keys in the same order;
        the position of a key is the number in the `domain` field of batches.
      weights: sampling weight of each domain, in that order; they sum to 1.
      manifest: a JSON-serialisable record of what was read: the Python version; a sha256 and the size of all
        content and of each domain; every file with its number of documents and bytes.
      cache: the folder that keeps text and tokens; None: they are in memory.
    """

    train: Mapping[str, Documents]
    validation: Mapping[str, Documents]
    weights: tuple[float, ...]
    manifest: dict
    cache: pathlib.Path | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.train)


def load_corpus(
    cfg: DataConfig, *, only_validation: bool = False, cache: pathlib.Path | None = None
) -> Corpus:
    """Reads every source of `cfg` and splits it; see `moejax.data.sources` for their syntax.

    `only_validation` splits nothing: all documents are held out, to evaluate a model on them.
    Bytes are UTF-8 bytes of the text. Empty documents are left out. A domain of a single document
    (one long text file) is cut at a line end, its tail held out. Bad records (not JSON, without text,
    not UTF-8) are errors; with `cfg.skip_bad_records` they are skipped, and a warning counts them.

    With `cache`, a folder, text is read piece by piece and kept there. It is not read again while its files
    have the same names, sizes and times.

    Raises:
      DataError: bad syntax, two domains with the same name, missing or broken files, nothing to hold out, a
        full disk.
    """
    groups = [_source_domains(source, cfg) for source in cfg.sources]
    domains: dict[str, Documents] = {}
    counts: dict[str, int] = {}
    for source, group in zip(cfg.sources, groups):
        for name, documents in group.items():
            if name in domains:
                raise DataError(
                    f"data.sources: {source!r}: there is a domain {name!r} already; give this one another name"
                )
            skipped = Skipped() if cfg.skip_bad_records else None
            kept = _kept(documents, cfg.max_bytes, name, skip=skipped)
            if cache is None:
                domains[name] = tuple(document for document, _ in kept)
            else:
                domains[name] = _stored(kept, cache, source, cfg, name, skipped or Skipped())
            if skipped is not None and skipped.count:
                skipped.warn(name)
                counts[name] = skipped.count
    if only_validation:
        train, validation = dict.fromkeys(domains, ()), domains
    else:
        train, validation = _split(domains, cfg.validation_fraction)
    used = validation if only_validation else train
    bytes_of = {name: texts.num_bytes(documents) for name, documents in used.items()}
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
        train, validation, weights, _manifest(cfg, train, validation, weights, counts), cache
    )


def _source_domains(
    source: str, cfg: DataConfig
) -> dict[str, Iterable[Document] | Iterable[Document | DataError]]:
    """The domains of one source and their (unread) documents."""
    if source == "builtin":
        limit = min(cfg.max_bytes or builtin.MAX_BYTES, builtin.MAX_BYTES)
        return {
            name: (document for document, _ in _kept(stream(), limit, name, distinct=True))
            for name, stream in builtin.domains().items()
        }
    name, target = parse_source(source)
    return {name: read_documents(target, cfg.text_field, cfg.max_bytes)}


def _stored(
    kept: Iterator[tuple[Document, bytes]],
    cache: pathlib.Path,
    source: str,
    cfg: DataConfig,
    name: str,
    skipped: Skipped,
) -> Documents:
    described = _describe(source, cfg)

    def unchanged():
        yield from kept
        if _describe(source, cfg) != described:
            raise DataError(f"data.sources: {source!r}: its files changed while they were read")

    return texts.keep(unchanged(), cache, described, name, skipped)


def _describe(source: str, cfg: DataConfig) -> dict | None:
    """What the documents of a source depend on, without reading it; None if only reading it can tell."""
    target = "hf:" if source == "builtin" else parse_source(source)[1]
    if target.startswith("hf:"):
        return None
    stats = [(file, os.path.realpath(file), os.stat(file)) for file in files.find(target)]
    return {
        "files": [[f, real, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for f, real, s in stats],
        "text_field": cfg.text_field,
        "max_bytes": cfg.max_bytes,
        "skip_bad_records": cfg.skip_bad_records,
    }


def _kept(
    documents: Iterable[Document | DataError],
    max_bytes: int,
    domain: str,
    *,
    distinct: bool = False,
    skip: Skipped | None = None,
) -> Iterator[tuple[Document, bytes]]:
    """The documents of the first `max_bytes` bytes (0: all) of a domain, each with its bytes; the one at the
    limit is cut.

    A bad record raises its error, or is counted in `skip`. So does a domain without text.
    """
    taken, total, seen, number = 0, 0, set(), 0
    for item in _encoded(documents):
        number += 1
        if max_bytes and number - taken > _MOST_EMPTY:
            raise DataError(
                f"data.sources: {_MOST_EMPTY:,} records of domain {domain!r} have no text; "
                "leave their file out"
            )
        if isinstance(item, DataError):
            if skip is None:
                raise item
            skip.add(item)
            continue
        document, data = item
        if not document.text.strip() or (distinct and document.text in seen):
            continue
        seen.add(document.text if distinct else None)
        if max_bytes and total + len(data) >= max_bytes:
            # 'ignore' drops a character that the limit cuts in half.
            text = data[: max_bytes - total].decode("utf-8", "ignore")
            if text.strip():
                taken += 1
                yield dataclasses.replace(document, text=text), text.encode()
            break
        total += len(data)
        taken += 1
        yield document, data
    if not taken:
        if skip is not None:
            skip.warn(domain)
        raise DataError(f"data.sources: domain {domain!r} has no text: every document is empty")


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


def _split(
    domains: dict[str, Documents], fraction: float
) -> tuple[dict[str, Documents], dict[str, Documents]]:
    """Split into (train, validation). A document is held out if its hash, read as a number in [0, 1), is below
    `fraction`. A domain without such a document holds out the one with the smallest hash."""
    pairs = {name: _cut(d[0], fraction) for name, d in domains.items() if len(d) == 1}
    words = {  # a hash is four numbers of 64 bits, the first one counts most
        name: texts.digests(documents).view(">u8")
        for name, documents in domains.items()
        if name not in pairs
    }
    sides = {name: ws[:, 0] < np.uint64(int(fraction * 2**64)) for name, ws in words.items()}
    smallest = [_smallest(words[name]) for name, side in sides.items() if not side.any()]
    for name, side in sides.items():
        for hash_ in smallest:
            side |= (words[name] == hash_).all(axis=1)
    train, validation = {}, {}
    for name, documents in domains.items():
        if name in pairs:
            train[name], validation[name] = pairs[name]
            continue
        side = sides[name]
        train[name] = texts.select(documents, ~side)
        validation[name] = texts.select(documents, side)
        if not train[name]:
            raise DataError(
                f"data.sources: all {len(documents)} documents of domain {name!r} are held out "
                f"for validation (data.validation_fraction={fraction}): they are too few, or all "
                "the same; give it more different documents"
            )
    return train, validation


def _smallest(words: np.ndarray) -> np.ndarray:
    """The smallest of some hashes."""
    least = words[words[:, 0] == words[:, 0].min()]
    return min(least, key=lambda hash_: hash_.tobytes())


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


def _manifest(cfg, train, validation, weights, skipped) -> dict:
    sums: dict[str, str] = {}
    entries: dict[tuple[str, str], dict] = {}
    for domain in train:
        content = hashlib.sha256()
        for documents in (train[domain], validation[domain]):
            content.update(texts.digests(documents).data)
            for file, count, size in texts.by_file(documents):
                entry = entries.setdefault(
                    (domain, file), {"domain": domain, "file": file, "documents": 0, "bytes": 0}
                )
                entry["documents"] += count
                entry["bytes"] += size
        sums[domain] = content.hexdigest()
    return {
        "python": sys.version.split()[0],
        "sources": list(cfg.sources),
        "sha256": hashlib.sha256(json.dumps(sums).encode()).hexdigest(),
        "bytes": sum(entry["bytes"] for entry in entries.values()),
        "domains": {
            name: {
                "sha256": sums[name],
                "weight": weight,
                "train_documents": len(train[name]),
                "train_bytes": texts.num_bytes(train[name]),
                "validation_documents": len(validation[name]),
                "validation_bytes": texts.num_bytes(validation[name]),
            }
            for name, weight in zip(train, weights)
        },
        "files": list(entries.values()),
        **({"skipped_records": skipped} if skipped else {}),
    }

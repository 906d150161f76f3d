"""Turns text into ids and back: bytes, a BPE trained on the corpus, or any tokenizer.json.

Every tokenizer has a separator that opens a document (`bos_id`) and one that is the target after its last
token (`eos_id`). `encode` never returns them, even if a text spells the name of a special token.
"""

import collections
import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax.config import DataConfig
from moejax.data.corpus import Corpus
from moejax.data.decoding import BYTE_TOKEN, Decoding, find_decoding, join_bytes
from moejax.data.separators import PADDING, SEPARATOR, Separators, by_names, read_separators
from moejax.data.sources import DataError
from moejax.data.tokenizer_check import check_tokenizer
from moejax.text import cut

FILE_NAME = "tokenizer.json"
MOST_TOKENS = 2**24  # a larger id is a mistake: published vocabularies stay below 2^19
# BPE learns from at most this much text of the training documents: a few seconds on one core.
BPE_TRAINING_BYTES = 6_000_000


class Counted(NamedTuple):
    """The n tokens of a text and its bytes in UTF-8.

    Attributes:
      ids: the token ids.
      num_bytes: n + 1 numbers, int32. The first n are the bytes of text from the end of the previous token to
        the end of this one. The last is whatever follows the last token (a space that a normaliser removed)
        and belongs to the end of the document. Together they are all bytes of the text.
      unknown: bytes that the vocabulary cannot express, as an unknown token or dropped.
    """

    ids: list[int]
    num_bytes: np.ndarray
    unknown: int


class Tokenizer(Protocol):
    """The interface of a tokenizer for the rest of moejax.

    Attributes:
      vocab_size: ids are in [0, vocab_size).
      bos_id, eos_id, pad_id: separators and padding; bos and eos may be the same id.
      pieces: the bytes each id stands for, V entries; b"" for special tokens. Exact for 'byte' and
        byte-level BPE; of other tokenizers, whose text depends on what stands beside, to look at.
      decoding: how `StreamDecoder` turns ids into text piece by piece.
      lossless: every text can be expressed in tokens, so that nothing is unknown.
      fingerprint: what the ids of a text depend on; tokenizers with the same one encode alike.
    """

    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int
    pieces: list[bytes]
    decoding: Decoding
    lossless: bool
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without separators."""
        ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` of many texts, in parallel where the tokenizer can."""
        ...

    def encode_counted(self, texts: list[str]) -> list["Counted"]:
        """Like `encode_batch`, with the bytes that each token stands for; slower."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special tokens are left out, incomplete characters become U+FFFD."""
        ...


class ByteTokenizer:
    """UTF-8 bytes 0-255, then the separator and padding."""

    vocab_size, bos_id, eos_id, pad_id = 258, 256, 256, 257
    decoding = Decoding("bytes", frozenset((256, 257)))
    lossless = True
    fingerprint = "byte"

    def __init__(self):
        self.pieces = [bytes([b]) for b in range(256)] + [b"", b""]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_counted(self, texts: list[str]) -> list[Counted]:
        ids = self.encode_batch(texts)
        return [Counted(i, (np.arange(len(i) + 1) < len(i)).astype(np.int32), 0) for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        return join_bytes(self.pieces, ids).decode("utf-8", "replace")


class JsonTokenizer:
    """A tokenizer.json of the `tokenizers` library.

    Args:
      text: the content of the file; it is kept.
      name: the file's name in error messages.
      find: gives the separators of the tokenizer; None: by names.

    Attributes:
      special: the special tokens, text -> id.

    Raises DataError wherever the library fails. Give a file from strangers to `check_tokenizer` first.
    """

    def __init__(
        self, text: str, name: str, find: Callable[["JsonTokenizer"], Separators] | None = None
    ):
        self._name = name
        self._tokenizer = self._safe(tokenizers.Tokenizer.from_str, text)
        described = self._safe(json.loads, text)
        self.text = text
        digest = hashlib.sha256(text.encode()).hexdigest()
        self.fingerprint = f"tokenizers {tokenizers.__version__} {digest}"
        # Text that spells a special token is still text.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocab = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if not 0 < self.vocab_size <= MOST_TOKENS:
            raise DataError(
                f"{name}: {self.vocab_size:,} token ids; 1 to {MOST_TOKENS:,} are supported"
            )
        self.special = {t["content"]: t["id"] for t in _added(described) if t["special"]}
        self.decoding = find_decoding(described, vocab, set(self.special.values()))
        self.pieces = _pieces(described, vocab, self.vocab_size, self.decoding.kind == "bytes")
        model = described["model"]
        unknown = model.get("unk_token")
        unigram = model.get("unk_id")  # only Unigram gives a number
        self._unknown_id = unigram if unigram is not None else vocab.get(unknown, -1)
        self._missing_bytes = _missing_bytes(described, vocab)
        self.lossless = self._missing_bytes == b""
        self._inexpressible: dict[str, bool] = {}
        found = find(self) if find is not None else by_names(self.special, name)
        self.bos_id, self.eos_id, self.pad_id = found
        if find is not None and max(found) >= self.vocab_size:
            raise DataError(f"{name}: {found} are not among its {self.vocab_size} tokens")

    def _safe(self, call: Callable, *args, **kwargs) -> Any:
        """Call the library. A panic of its Rust code is not an Exception."""
        try:
            return call(*args, **kwargs)
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as e:
            raise DataError(
                f"{self._name}: not a tokenizer.json that the `tokenizers` library can use "
                f"({cut(str(e), 400)})"
            ) from e

    def token_id(self, token: str) -> int | None:
        """The id of a token by its text, special or not."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        return self._safe(self._tokenizer.encode, text, add_special_tokens=False).ids

    def encode_framed(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the file's post-processor puts around every text."""
        return self._safe(self._tokenizer.encode, text, add_special_tokens=True).ids

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which names of special tokens mean those tokens, as in a rendered chat template."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encode = self._tokenizer.encode_batch_fast
        return [e.ids for e in self._safe(encode, texts, add_special_tokens=False)]

    def encode_counted(self, texts: list[str]) -> list[Counted]:
        encoded = self._safe(self._tokenizer.encode_batch, texts, add_special_tokens=False)
        return [self._count(text, e) for text, e in zip(texts, encoded)]

    def _count(self, text: str, encoded: tokenizers.Encoding) -> Counted:
        num_bytes = _bytes_by_end(text, (end for _, end in encoded.offsets))
        unknown = 0
        if not self.lossless and self._unknown_id in encoded.ids:
            spans = zip(encoded.ids, encoded.offsets)
            unknown = sum(len(text[a:b].encode()) for i, (a, b) in spans if i == self._unknown_id)
        elif self._missing_bytes:
            unknown = sum(map(text.encode().count, self._missing_bytes))
        elif not self.lossless and self._unknown_id < 0:  # what is not in the vocabulary is dropped
            for character, times in collections.Counter(text).items():
                unknown += times * len(character.encode()) * self._is_dropped(character)
        return Counted(encoded.ids, num_bytes, unknown)

    def _is_dropped(self, character: str) -> bool:
        if character not in self._inexpressible:
            # Whatever is put before a text, three of a dropped character are encoded as one is.
            same = self.encode(character * 3) == self.encode(character)
            self._inexpressible[character] = same and not character.isspace()
        return self._inexpressible[character]

    def decode(self, ids: Iterable[int]) -> str:
        if self.decoding.kind == "bytes":
            return join_bytes(self.pieces, ids).decode("utf-8", "replace")
        ids = [i for i in ids if i < self.vocab_size]
        return self._safe(self._tokenizer.decode, ids, skip_special_tokens=True)


def load_tokenizer(
    cfg: DataConfig, corpus: Corpus | None = None, kept: pathlib.Path | None = None
) -> Tokenizer:
    """The tokenizer of a run: `cfg.tokenizer` = 'byte', 'bpe', or the path of a tokenizer.json.

    A run keeps a copy of a 'bpe' or of a file and always reads that copy, so it can be resumed, evaluated and
    moved without the corpus or the original file.

    Args:
      corpus: trains the BPE; not needed once there is a copy.
      kept: the path of the run's copy, which need not exist yet; nothing is written.

    Raises:
      DataError: the file does not exist, the copy is another tokenizer, or there is nothing to train on.
    """
    if cfg.tokenizer == "byte":
        return ByteTokenizer()
    copy = _read(kept) if kept is not None and kept.exists() else None
    if cfg.tokenizer == "bpe":
        text = copy or train_bpe(corpus, cfg.vocab_size)
    else:
        text = _external(cfg.tokenizer, kept, copy)
    kept_ids = read_separators(kept) if kept is not None and copy else None
    find = None if kept_ids is None else lambda _: kept_ids
    tokenizer = JsonTokenizer(text, str(kept if copy else cfg.tokenizer), find)
    if cfg.tokenizer == "bpe" and tokenizer.vocab_size > cfg.vocab_size:
        raise DataError(
            f"{kept} has {tokenizer.vocab_size} tokens, more than data.vocab_size="
            f"{cfg.vocab_size}: it belongs to another config; set data.vocab_size to it, or use another workdir"
        )
    return tokenizer


def train_bpe(corpus: Corpus | None, vocab_size: int) -> str:
    """A byte-level BPE of the training documents, as the content of a tokenizer.json.

    Lossless: no normalisation, all 256 bytes in the alphabet. `vocab_size` includes the two special
    tokens; a small corpus may yield fewer. It learns from at most `BPE_TRAINING_BYTES` of text: an equal
    share of each domain, its first documents.
    """
    if vocab_size < 258:
        raise DataError(
            f"data.vocab_size={vocab_size} must be at least 258 for data.tokenizer='bpe': "
            "256 bytes and 2 special tokens"
        )
    if corpus is None:
        raise DataError(
            f"data.tokenizer='bpe': no {FILE_NAME} in the workdir, and no corpus to train one on"
        )
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,  # pyright: ignore[reportCallIssue]
        special_tokens=[SEPARATOR, PADDING],  # pyright: ignore[reportCallIssue]
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore[reportCallIssue]
        show_progress=False,  # pyright: ignore[reportCallIssue]
    )
    tokenizer.train_from_iterator(_training_texts(corpus), trainer)
    return tokenizer.to_str()


def _training_texts(corpus: Corpus) -> Iterator[str]:
    share = BPE_TRAINING_BYTES // len(corpus.train)
    for documents in corpus.train.values():
        left = share
        for document in documents:
            # Slices characters, not bytes: never too many, and the bytes of a huge document are not counted.
            yield (text := document.text[:left])
            left -= len(text.encode())
            if left <= 0:
                break


def _external(path: str, kept: pathlib.Path | None, copy: str | None) -> str:
    """The tokenizer.json at `path`, or the run's copy. If both exist they must be equal."""
    source = pathlib.Path(path).expanduser()
    source = source / FILE_NAME if source.is_dir() else source
    if not source.exists():
        if copy is not None:
            return copy
        raise DataError(
            f"data.tokenizer={path!r}: no such file; expected 'byte', 'bpe' or the path of a "
            f"{FILE_NAME}"
        )
    text = _read(source)
    if copy is None:
        check_tokenizer(text, str(source))
    if copy is not None and copy != text:
        raise DataError(
            f"{kept} is not the tokenizer data.tokenizer={path!r}: the workdir belongs to "
            "another run"
        )
    return text


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not a readable tokenizer.json ({e})") from e


def _bytes_by_end(text: str, ends: Iterable[int]) -> np.ndarray:
    """The bytes that each token adds, and those left at the end, from where each token ends in the text."""
    widths = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + np.sum(
        [widths >= limit for limit in (0x80, 0x800, 0x10000)], axis=0, dtype=np.int32
    )
    at = np.concatenate([[0], np.cumsum(widths, dtype=np.int64)])
    # A normaliser may reorder characters; keep the ends in ascending order.
    reached = np.maximum.accumulate(np.array([0, *ends], np.int64))
    return np.diff([*at[np.minimum(reached, len(text))], at[-1]]).astype(np.int32)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: the byte itself if it is printable in Latin-1, else the next
    code point from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _missing_bytes(described: dict, vocab: dict[str, int]) -> bytes | None:
    """The bytes that a tokenizer of bytes has no token for; None if it is not one of bytes."""
    before = json.dumps([described.get("normalizer"), described.get("pre_tokenizer")])
    if '"ByteLevel"' in before:
        return bytes(b for c, b in byte_alphabet().items() if c not in vocab)
    fallback = described["model"].get("byte_fallback")
    whole = fallback and all(f"<0x{b:02X}>" in vocab for b in range(256))
    return b"" if whole else None


def _added(described: dict) -> list[dict]:
    """The tokens added to the model's own vocabulary. `tokenizers` has checked their fields."""
    return described.get("added_tokens") or []


def _pieces(described: dict, vocab: dict[str, int], size: int, byte_level: bool) -> list[bytes]:
    """The bytes of every id; b"" for an id without a token."""
    alphabet = byte_alphabet()
    special = {t["content"] for t in _added(described) if t["special"]}
    pieces = [b""] * size
    for token, i in vocab.items():
        if token in special:
            continue
        if byte_level and alphabet.keys() >= set(token):
            pieces[i] = bytes(alphabet[c] for c in token)
        elif BYTE_TOKEN.fullmatch(token):  # SentencePiece's byte fallback
            pieces[i] = bytes.fromhex(token[3:5])
        else:
            pieces[i] = token.replace("▁", " ").encode()
    return pieces

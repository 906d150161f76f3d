"""Turns ids into text piece by piece. The pieces together are the text that `Tokenizer.decode` returns.

There are three kinds of decoders. The description in a tokenizer.json says which one it is:

    bytes     each id is some bytes, whatever ids are next to it: bytes, byte-level BPE
    context   an id's text depends on a few ids before it: words with spaces between them, WordPiece,
              Metaspace, SentencePiece with byte fallback and a stripped first space
    whole     all others (CTC, a right strip, unknown ones): the text comes once all ids are there
"""

import codecs
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_OF_ONE_TOKEN = ("Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip", "BPEDecoder")


class Decoding(NamedTuple):
    """Attributes:
    kind: 'bytes', 'context' or 'whole'.
    silent: ids of special tokens, which `decode` leaves out.
    byte_ids: ids that are one byte each; a run of them is decoded together (only for 'context').
    """

    kind: str
    silent: frozenset[int] = frozenset()
    byte_ids: frozenset[int] = frozenset()


class _Decoder(Protocol):
    vocab_size: int
    decoding: Decoding
    pieces: list[bytes]

    def decode(self, ids: Iterable[int]) -> str: ...


def find_decoding(described: dict[str, Any], vocab: dict[str, int], special: set[int]) -> Decoding:
    """How the decoder of a tokenizer.json works.

    Args:
      described: the content of the file.
      vocab: every token and its id, added ones included.
      special: ids of special tokens.
    """
    steps = _flat(described.get("decoder"))
    silent = frozenset(special)
    names = [step.get("type") for step in steps]
    if names in (["ByteLevel"], ["ByteLevel", "Fuse"]):
        return Decoding("bytes", silent)
    fused = False
    for step, name in zip(steps, names):
        # After Fuse, a step may change any part of the text; only stripping its start surely does not.
        if fused and not (name == "Strip" and not step.get("stop")):
            return Decoding("whole", silent)
        fused = fused or name == "Fuse"
        if not fused and name not in _OF_ONE_TOKEN:
            return Decoding("whole", silent)
        if name == "BPEDecoder":  # an end-of-word suffix decodes differently in the last token
            end = str(step.get("suffix"))
            if not end or any(end in token.removesuffix(end) for token in vocab):
                return Decoding("whole", silent)
    byte_ids = {i for token, i in vocab.items() if BYTE_TOKEN.fullmatch(token)}
    return Decoding("context", silent, frozenset(byte_ids if "ByteFallback" in names else ()))


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [step for inner in decoder.get("decoders", ()) for step in _flat(inner)]


def join_bytes(pieces: list[bytes], ids: Iterable[int]) -> bytes:
    """The bytes of ids. A model may be wider than its tokenizer: ids beyond it stand for nothing."""
    return b"".join(pieces[i] for i in ids if i < len(pieces))


class StreamDecoder:
    """Ids in, text out as soon as it is complete: for printing while generating.

    The concatenation of all `push` results and `flush()` is `tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: _Decoder):
        self._tokenizer, self._how = tokenizer, tokenizer.decoding
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # Ids already written that the next ones depend on; ids not yet written.
        self._written: list[int] = []
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """The text that these ids complete; '' while a character is incomplete."""
        if self._how.kind == "bytes":
            return self._utf8.decode(join_bytes(self._tokenizer.pieces, ids))
        self._held += [
            i for i in ids if i < self._tokenizer.vocab_size and i not in self._how.silent
        ]
        unsure = self._how.kind == "whole" or not self._held or self._held[-1] in self._how.byte_ids
        return "" if unsure else self._write()

    def _write(self) -> str:
        before = self._tokenizer.decode(self._written)
        text = self._tokenizer.decode(self._written + self._held)
        # Keep a visible token as context, or the next one would be decoded as the first.
        context = self._held if self._tokenizer.decode(self._held) else self._written + self._held
        self._written, self._held = context, []
        return text[len(before) :]

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an incomplete character, else ''."""
        if self._how.kind == "bytes":
            return self._utf8.decode(b"", final=True)
        return self._write() if self._held else ""

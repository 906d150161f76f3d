"""Tokenizers of every kind: a stream says what `decode` says, and bytes are those of the text."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from moejax.config import DataConfig
from moejax.data.corpus import Corpus
from moejax.data.decoding import StreamDecoder
from moejax.data.pipeline import train_iterator, validation_batches
from moejax.data.sources import Document
from moejax.data.tokenizer import ByteTokenizer, JsonTokenizer

WORDS = [
    *("the", "a", "b", "c", "é", "日", ".", ",", "'", "n't", "do", "s", "m", "!", " ", ""),
    *("##a", "##b", "##é", "##", "▁", "▁the", "▁a", "▁▁", "a</w>", "the</w>", "</w>", "<0x", "�"),
]


def words(byte_fallback=False, extra=()):
    tokens = ["[UNK]", *WORDS, *extra]
    if byte_fallback:
        tokens += [f"<0x{b:02X}>" for b in range(256)]
    return {token: i for i, token in enumerate(tokens)}


def sequence(*steps):
    return decoders.Sequence(list(steps))


def byte_alphabet():
    return {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def finished(whole):
    """With a separator, a token of several words that is text, and as moejax reads it."""
    whole.add_special_tokens([AddedToken("</s>", special=True), AddedToken("<s>", special=True)])
    whole.add_tokens([AddedToken("<think>"), AddedToken("né")])
    return JsonTokenizer(whole.to_str(), "test"), whole


def of_words(decoder, byte_fallback=False):
    whole = tokenizers.Tokenizer(models.WordLevel(words(byte_fallback), unk_token="[UNK]"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    if decoder is not None:
        whole.decoder = decoder
    return finished(whole)


def of_bytes(decoder):
    whole = tokenizers.Tokenizer(models.BPE(byte_alphabet(), []))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoder
    return finished(whole)


REPLACE = decoders.Replace("▁", " ")
KINDS = {
    "bytes": of_bytes(decoders.ByteLevel()),
    "bytes in a sequence": of_bytes(sequence(decoders.ByteLevel())),
    "bytes and more": of_bytes(sequence(decoders.ByteLevel(), decoders.Replace("ab", "c"))),
    "words": of_words(None),
    "wordpiece": of_words(decoders.WordPiece()),
    "wordpiece as it is": of_words(decoders.WordPiece(cleanup=False)),
    "metaspace": of_words(decoders.Metaspace()),
    "metaspace never": of_words(decoders.Metaspace(prepend_scheme="never")),
    "suffix": of_words(decoders.BPEDecoder()),
    "llama 2": of_words(
        sequence(REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)), True
    ),
    "two spaces stripped": of_words(
        sequence(REPLACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 0)), True
    ),
    "gemma": of_words(sequence(REPLACE, decoders.ByteFallback(), decoders.Fuse()), True),
    "bytes shown": of_words(sequence(REPLACE, decoders.Fuse()), True),
    "late replace": of_words(sequence(decoders.Fuse(), decoders.Replace("ab", "c"))),
    "ctc": of_words(decoders.CTC(pad_token="a", word_delimiter_token="b")),
    "ours": (ByteTokenizer(), None),
}


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_stream_says_what_decode_says(kind, data):
    """Of any ids, pushed in any portions: special ones, ids beyond the vocabulary, broken characters."""
    tokenizer, library = KINDS[kind]
    ids = st.integers(0, tokenizer.vocab_size + 1)
    some_bytes = sorted(tokenizer.decoding.byte_ids)
    if some_bytes:  # runs of bytes that are characters, or nearly
        of = {bytes.fromhex(tokenizer.pieces[i].hex()): i for i in some_bytes}
        runs = st.sampled_from("aé日😀").map(lambda c: [of[bytes([b])] for b in c.encode()])
        portions = st.lists(runs | st.lists(ids, max_size=4), max_size=8)
    else:
        portions = st.lists(st.lists(ids, max_size=4), max_size=8)
    pushed = data.draw(portions)
    decoder = StreamDecoder(tokenizer)
    said = "".join(decoder.push(portion) for portion in pushed) + decoder.flush()
    every = [i for portion in pushed for i in portion]
    assert said == tokenizer.decode(every)
    if library is not None:
        known = [i for i in every if i < tokenizer.vocab_size]
        assert said == library.decode(known, skip_special_tokens=True)


STREAMED = [k for k in KINDS if k not in ("bytes and more", "late replace", "ctc")]


@pytest.mark.parametrize("kind", STREAMED)
def test_text_comes_while_it_is_written(kind):
    tokenizer, _ = KINDS[kind]
    ids = [*tokenizer.encode("the a b the c")] * 5
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push([i]) for i in ids]
    assert sum(map(bool, pieces)) > len(ids) / 2 and decoder.flush() == ""


def test_a_long_stream_is_not_quadratic(monkeypatch):
    """What is decoded for a push is a few ids, not all that came."""
    tokenizer, _ = KINDS["llama 2"]
    longest = 0
    decode = tokenizer.decode

    def watched(ids):
        nonlocal longest
        longest = max(longest, len(list(ids)))
        return decode(ids)

    monkeypatch.setattr(tokenizer, "decode", watched)
    decoder = StreamDecoder(tokenizer)
    for i in tokenizer.encode("the a b the c") * 100:
        decoder.push([i])
    assert longest < 10


def test_wordlevel_streams_its_spaces():
    """0.1.0 said 'theab'."""
    tokenizer, _ = of_words(None)
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push([i]) for i in tokenizer.encode("the a b")] == ["the", " a", " b"]


def test_llama_2_has_no_leading_space_and_whole_characters():
    tokenizer, _ = KINDS["llama 2"]
    e_acute = [tokenizer.pieces.index(bytes([b])) for b in "😀".encode()]
    the = [words(True)["▁the"]]
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push([i]) for i in [*the, *the, *e_acute, *the]] == [
        *("the", " the", "", "", "", "", "😀 the")
    ]


NORMALIZERS = {
    "none": None,
    "lower": normalizers.Lowercase(),
    "nfkc": normalizers.NFKC(),
    "nfd": normalizers.NFD(),
    "bert": normalizers.BertNormalizer(),
    "strip": normalizers.Strip(),
    "prepend": normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
}
PRE = {
    "bytes": (pre_tokenizers.ByteLevel(add_prefix_space=True), byte_alphabet()),
    "bytes as they are": (pre_tokenizers.ByteLevel(add_prefix_space=False), byte_alphabet()),
    "characters": (pre_tokenizers.Metaspace(), {c: i for i, c in enumerate("▁abcé日")}),
}


def counting(normalizer, pre, unk=None):
    before, vocab = PRE[pre]
    vocab = vocab | ({unk: len(vocab)} if unk else {})
    whole = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token=unk))
    whole.pre_tokenizer = before
    if NORMALIZERS[normalizer] is not None:
        whole.normalizer = NORMALIZERS[normalizer]
    whole.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 0)])
    return finished(whole)[0]


TEXTS = st.text(
    st.sampled_from("abcXÅé\u0301ﬁ日😀 \n\t") | st.characters(codec="utf-8"), max_size=30
)


@pytest.mark.parametrize("pre", PRE)
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@given(text=TEXTS)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_bytes_are_those_of_the_text(normalizer, pre, text):
    tokenizer = counting(normalizer, pre)
    [counted] = tokenizer.encode_counted([text])
    assert counted.ids == tokenizer.encode(text)
    assert len(counted.num_bytes) == len(counted.ids) + 1 and counted.num_bytes.min() >= 0
    assert counted.num_bytes.sum() == len(text.encode())
    assert 0 <= counted.unknown <= len(text.encode())
    if tokenizer.lossless:
        assert counted.unknown == 0


def test_bytes_lie_where_their_tokens_end():
    lower = counting("lower", "bytes")
    [counted] = lower.encode_counted(["AÉ😀"])
    # The tokens are those of ' aé😀': the space is none of the text, and a character of several bytes counts
    # with its first.
    assert len(counted.ids) == 8
    assert counted.num_bytes.tolist() == [1, 0, 2, 0, 4, 0, 0, 0, 0]
    stripped = counting("strip", "bytes as they are")
    [counted] = stripped.encode_counted(["a  \n"])
    assert counted.num_bytes.tolist() == [1, 3]  # what was stripped belongs to the end
    [ours] = ByteTokenizer().encode_counted(["é"])
    assert ours.num_bytes.tolist() == [1, 1, 0]


@pytest.mark.parametrize(
    "tokenizer, text, unknown",
    [
        (counting("none", "characters"), "ab ßx日😀", 2 + 1 + 4),  # dropped without a word
        (counting("none", "characters", "<unk>"), "ab ßx日😀", 2 + 1 + 4),
        (counting("none", "bytes"), "ab ßx日😀", 0),
        (of_words(None)[0], "the ünknown b", 8),
        (KINDS["ours"][0], "ab ßx日😀", 0),
    ],
)
def test_what_a_vocabulary_cannot_express_is_counted(tokenizer, text, unknown):
    [counted] = tokenizer.encode_counted([text])
    assert counted.unknown == unknown


def test_missing_bytes_are_counted():
    alphabet = {c: i for i, c in enumerate(c for c in byte_alphabet() if c != "a")}
    whole = tokenizers.Tokenizer(models.BPE(alphabet, []))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer, _ = finished(whole)
    assert not tokenizer.lossless and tokenizer.encode_counted(["banana é"])[0].unknown == 3


def corpus_of(texts):
    documents = {"d": tuple(Document("f", i, t) for i, t in enumerate(texts))}
    return Corpus(documents, documents, (1.0,), {})


def test_lost_bytes_are_said_in_training_and_on_held_out_text():
    corpus = corpus_of(["the ünknown b"])
    cfg = DataConfig(seq_len=4, batch_size=1)
    tokenizer = of_words(None)[0]
    with pytest.warns(
        UserWarning, match="8 of the 14 bytes .* of the held-out documents of domain 'd'"
    ):
        validation_batches(corpus, tokenizer, cfg)
    with pytest.warns(UserWarning, match="8 of the 14 bytes .* of the training documents"):
        train_iterator(corpus, tokenizer, cfg)


@pytest.mark.parametrize("seq_len", [1, 3, 7, 64])
def test_batches_count_the_text_wherever_it_is_cut(seq_len):
    """The sum over all rows is the text; over some, the text up to the last token that was predicted."""
    texts = ["ÅB é\u0301 ﬁx  ", "日本\n", "plain text", "\u00a0"]
    tokenizer = counting("nfkc", "bytes")
    cfg = DataConfig(seq_len=seq_len, batch_size=2)
    batches = validation_batches(corpus_of(texts), tokenizer, cfg)
    assert sum(int(b["num_bytes"].sum()) for b in batches) == sum(len(t.encode()) for t in texts)
    rows = np.concatenate([b["num_bytes"] for b in batches]).reshape(-1)
    targets = np.concatenate([b["targets"] for b in batches]).reshape(-1)
    counts = np.concatenate([b["loss_mask"] for b in batches]).reshape(-1) > 0
    assert not rows[~counts].any()
    ends = np.flatnonzero((targets == tokenizer.eos_id) & counts)
    by_hash = sorted(texts, key=lambda t: hashlib.sha256(t.encode()).digest())
    for text, begin, end in zip(by_hash, [0, *(ends[:-1] + 1)], ends, strict=True):
        assert rows[begin : end + 1].sum() == len(text.encode())


def test_pieces_of_odd_tokens():
    """A token that only looks like a byte is text."""
    whole = tokenizers.Tokenizer(
        models.WordLevel(words(extra=("<0xZZ>", "<0x4A>")), unk_token="[UNK]")
    )
    tokenizer, _ = finished(whole)
    assert b"<0xZZ>" in tokenizer.pieces and b"J" in tokenizer.pieces
    assert json.loads(tokenizer.text)["decoder"] is None

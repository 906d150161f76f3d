"""Tokenizers: lossless, exact in bytes, kept with the run, streamed without broken characters."""

import dataclasses
import json

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moejax.config import DataConfig
from moejax.data.corpus import Corpus
from moejax.data.decoding import StreamDecoder
from moejax.data.sources import DataError, Document
from moejax.data.tokenizer import load_tokenizer, train_bpe

HARD_TEXTS = [
    "",
    " leading and trailing \r\n\t",
    "def f(x):\n    return x ** 2  # naïve\n",
    "日本語, ελληνικά, 😀👩‍👩‍👧, e\u0301 is not é",
    "\x00\x01\x7f\u2028\ufeff\ufffd",
    "the names <|endoftext|> and <|pad|> are text",
    "".join(map(chr, range(1, 0x500))),
]


def make_corpus(train, validation=("held out",)):
    def documents(texts):
        return {"d": tuple(Document("f", i + 1, t) for i, t in enumerate(texts))}

    return Corpus(documents(train), documents(validation), (1.0,), {})


CORPUS = make_corpus(["the quick brown fox jumps over the lazy dog\n" * 20, "naïve 日本 " * 10])
BPE = DataConfig(tokenizer="bpe", vocab_size=300)
BYTE = DataConfig(tokenizer="byte")


@pytest.fixture(params=[BYTE, BPE], ids=["byte", "bpe"])
def tokenizer(request):
    return load_tokenizer(request.param, CORPUS)


def test_round_trip_is_lossless_and_counts_bytes(tokenizer):
    assert tokenizer.lossless
    assert len(tokenizer.pieces) == tokenizer.vocab_size
    for text, ids in zip(HARD_TEXTS, tokenizer.encode_batch(HARD_TEXTS)):
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert b"".join(tokenizer.pieces[i] for i in ids) == text.encode()
        assert not {tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id} & set(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_special_tokens_are_no_text(tokenizer):
    specials = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    assert max(specials) < tokenizer.vocab_size and tokenizer.pad_id != tokenizer.eos_id
    assert not any(tokenizer.pieces[i] for i in specials)
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id]) == "hi"


def test_stream_yields_complete_characters_only(tokenizer):
    text = "naïve 日本 😀!"
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push([i]) for i in tokenizer.encode(text)]
    assert "".join(parts) == text and decoder.flush() == ""
    assert "�" not in "".join(parts)
    assert "" in parts  # something was held back
    incomplete = tokenizer.encode("😀")[:-1]
    assert decoder.push(incomplete) == "" and decoder.flush() == "�"


def test_bpe_learns_from_training_documents_only():
    learned = load_tokenizer(BPE, make_corpus(["aaaa bbbb " * 50], ["zzzz yyyy " * 50]))
    assert b"aaaa" in learned.pieces and b"zz" not in learned.pieces
    assert len(learned.encode("aaaa bbbb")) < 9


def test_bpe_training_is_deterministic():
    assert train_bpe(CORPUS, 300) == train_bpe(CORPUS, 300)


def keep(cfg, corpus, path):
    """Load, and keep as a run does."""
    tokenizer = load_tokenizer(cfg, corpus, path)
    path.write_text(tokenizer.text, "utf-8")
    return tokenizer


def test_loading_writes_nothing(tmp_path):
    load_tokenizer(BPE, CORPUS, tmp_path / "copy.json")
    assert not list(tmp_path.iterdir())


def test_bpe_is_kept_and_reloaded_without_the_corpus(tmp_path):
    trained = keep(BPE, CORPUS, tmp_path / "run")
    again = load_tokenizer(BPE, None, tmp_path / "run")
    assert again.pieces == trained.pieces and again.eos_id == trained.eos_id
    other = load_tokenizer(BPE, make_corpus(["another text " * 50]), tmp_path / "run")
    assert other.pieces == trained.pieces


def test_bpe_of_a_tiny_corpus_is_smaller_than_asked():
    small = load_tokenizer(dataclasses.replace(BPE, vocab_size=5000), CORPUS)
    assert 258 < small.vocab_size < 5000
    assert small.decode(small.encode("xyz")) == "xyz"


def test_bpe_errors(tmp_path):
    with pytest.raises(DataError, match=r"data.vocab_size=257 must be at least 258"):
        load_tokenizer(dataclasses.replace(BPE, vocab_size=257), CORPUS)
    with pytest.raises(DataError, match=r"no tokenizer.json in the workdir"):
        load_tokenizer(BPE, None, tmp_path / "copy.json")
    keep(BPE, CORPUS, tmp_path / "copy.json")
    with pytest.raises(DataError, match=r"has 300 tokens, more than data.vocab_size=299"):
        load_tokenizer(dataclasses.replace(BPE, vocab_size=299), CORPUS, tmp_path / "copy.json")
    (tmp_path / "copy.json").write_text("{}")
    with pytest.raises(DataError, match=r"copy.json: not a tokenizer.json"):
        load_tokenizer(BPE, CORPUS, tmp_path / "copy.json")


def external(path, **changes):
    """A config for, and a file of, a tokenizer trained elsewhere."""
    described = json.loads(train_bpe(CORPUS, 300))
    path.write_text(json.dumps(described | changes))
    return DataConfig(tokenizer=str(path))


def test_external_file_is_not_needed_once_there_is_a_copy(tmp_path):
    cfg = external(tmp_path / "theirs.json")
    first = keep(cfg, None, tmp_path / "run")
    assert first.decode(first.encode("quick")) == "quick"
    (tmp_path / "theirs.json").rename(tmp_path / "moved.json")
    assert load_tokenizer(cfg, None, tmp_path / "run").pieces == first.pieces
    with pytest.raises(DataError, match="no such file; expected 'byte', 'bpe' or the path"):
        load_tokenizer(cfg, None, tmp_path / "other")


def test_external_file_must_agree_with_its_copy(tmp_path):
    cfg = external(tmp_path / "theirs.json")
    keep(cfg, None, tmp_path / "copy.json")
    external(tmp_path / "theirs.json", version="1.0 ")
    with pytest.raises(DataError, match="the workdir belongs to another run"):
        load_tokenizer(cfg, None, tmp_path / "copy.json")


def test_external_folder(tmp_path):
    external(tmp_path / "tokenizer.json")
    assert load_tokenizer(DataConfig(tokenizer=str(tmp_path))).vocab_size == 300


def special(content, i, is_special=True):
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, "special": is_special, **flags}


def test_external_separators(tmp_path):
    """DeepSeek's names, with bos and eos apart and no padding; user-defined tokens are text."""
    tokens = [
        special("<｜begin▁of▁sentence｜>", 300),
        special("<｜end▁of▁sentence｜>", 301),
        special("<think>", 302, is_special=False),
    ]
    tokenizer = load_tokenizer(external(tmp_path / "t.json", added_tokens=tokens))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (300, 301, 301)
    assert tokenizer.vocab_size == 303
    assert tokenizer.encode("<think>") == [302] and tokenizer.pieces[302] == b"<think>"
    cfg = external(tmp_path / "t.json", added_tokens=[special("<other>", 300)])
    with pytest.raises(
        DataError, match="no special token ends a document; its special tokens are <other>"
    ):
        load_tokenizer(cfg)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"decoder": None, "added_tokens": []}, "no special token ends a document"),
        ({"model": {"type": "BPE", "vocab": {"a": 2**32 - 6}, "merges": []}}, "4,294,967,291 token ids"),
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}, "0 token ids"),
    ],
)  # fmt: skip
def test_hostile_files(tmp_path, changes, text):
    with pytest.raises(DataError, match=text):
        load_tokenizer(external(tmp_path / "t.json", **changes))


def test_fields_may_be_left_out(tmp_path):
    described = json.loads(train_bpe(CORPUS, 300))
    del described["decoder"], described["added_tokens"]
    (tmp_path / "t.json").write_text(json.dumps(described))
    with pytest.raises(
        DataError, match="no special token ends a document; its special tokens are none"
    ):
        load_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))


def test_external_template_and_truncation_do_not_apply(tmp_path):
    """Chat-ready files add tokens or cut texts; documents get their separators from the packing."""
    whole = tokenizers.Tokenizer.from_str(train_bpe(CORPUS, 300))
    whole.enable_truncation(2)
    whole.enable_padding(length=9)
    whole.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    whole.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))
    assert tokenizer.decode(tokenizer.encode("quick brown fox")) == "quick brown fox"
    assert tokenizer.eos_id not in tokenizer.encode("xyz") and len(tokenizer.encode("xyz")) == 3


def test_sentencepiece_style(tmp_path):
    """Word-start marks count as spaces, byte fallbacks as bytes."""
    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "▁": 3, "a": 4, "▁a": 5}
    vocab |= {f"<0x{b:02X}>": 6 + b for b in range(256)}
    whole = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    whole.add_special_tokens(["<s>", "</s>"])
    whole.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(DataConfig(tokenizer=str(tmp_path / "t.json")))
    ids = tokenizer.encode("a aé")
    assert tokenizer.decode(ids) == "a aé" and (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert b"".join(tokenizer.pieces[i] for i in ids) == "a aé".encode()
    decoder = StreamDecoder(tokenizer)
    assert "".join(decoder.push([i]) for i in ids) + decoder.flush() == "a aé"


def test_ids_beyond_the_tokenizer_stand_for_nothing():
    """A published model may have more rows than its tokenizer has tokens, and a sampler may choose one."""
    tokenizer = load_tokenizer(DataConfig(tokenizer="byte"), CORPUS)
    decoder = StreamDecoder(tokenizer)
    ids = tokenizer.encode("ab")
    wide = [ids[0], tokenizer.vocab_size, ids[1]]
    assert decoder.push(wide) + decoder.flush() == tokenizer.decode(wide) == "ab"

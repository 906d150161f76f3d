"""Hostile files beside the tensors: JSON, names, tokenizers, weights; and two processes at one path."""

import json
import multiprocessing
import time
import tracemalloc

import numpy as np
import published
import pytest
import tokenizers

from moejax.config import ConfigError
from moejax.data.tokenizer import ByteTokenizer, JsonTokenizer
from moejax.data.tokenizer_check import check_tokenizer
from moejax.interop.files import InteropError, checked_file, parse_json, whole_folder
from moejax.interop.load import load_model
from moejax.interop.own_files import framed
from moejax.models import zoo
from moejax.text import cut, plain, shown

JSONS = {
    "thousands of digits": (b'{"a": %s}' % (b"9" * 3000), "a number of 3,000 digits"),
    "millions of digits": (b'{"a": %s}' % (b"9" * 3_000_000), "a number of 3,000,000 digits"),
    "half a character": (rb'{"a": "\ud800"}', "not valid JSON"),
    "half a character as a key": (rb'{"\udfff": 1}', "not valid JSON"),
    "half a character in UTF-8": (b'{"a": "\xed\xa0\x80"}', "not valid JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    "deep": (b'{"a":' * 100_000, "not valid JSON"),
    "many empty lists": (b'{"a": [' + b"[]," * 6_000_000 + b"0]}", "more than 5,000,000 values"),
    "a key with an escape": (b'{"\\u001b[2J": 1, "\\u001b[2J": 2}', "occurs twice"),
}


@pytest.mark.parametrize("data, text", JSONS.values(), ids=JSONS)
def test_json(data, text):
    with pytest.raises(InteropError, match=text) as e:
        parse_json(data, "x.json")
    assert "\x1b" not in str(e.value) and len(str(e.value)) < 1000


def test_json_that_is_odd_and_good():
    """A byte-order mark, a pair of surrogates, the 31 digits that published files have for 'no limit'."""
    data = b'\xef\xbb\xbf{"a": "\\ud83d\\ude00", "b": 1000000000000000019884624838656}'
    assert parse_json(data, "x") == {"a": "\U0001f600", "b": 1000000000000000019884624838656}


def test_a_repeated_key_is_found_in_linear_time():
    """A million keys, the last twice: by counting each, 10^12 steps."""
    data = json.dumps(dict.fromkeys(map(str, range(10**6)), 0))[:-1] + ', "999999": 1}'
    start = time.process_time()
    with pytest.raises(InteropError, match="the key '999999' occurs twice"):
        parse_json(data.encode(), "x.json")
    assert time.process_time() - start < 60  # a second where nothing else runs


@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "..", "", "a/b"])
def test_names_of_files(tmp_path, name):
    with pytest.raises(InteropError) as e:
        checked_file(tmp_path, name)
    assert len(str(e.value)) < 1000


def test_messages_are_short_and_printable():
    assert shown("\x1b[31m\u202eabc\ud800\n") == repr("\x1b[31m\u202eabc\ud800\n")
    assert plain("a\tb\nc\x07\x9b\u2066\ud800") == "a\tb\nc\\x07\\x9b\\u2066\\ud800"
    for value in (
        "x" * 10**6,
        [["y" * 999] * 999] * 999,
        {i: 10**9999 for i in range(999)},
        10**9999,
    ):
        assert len(shown(value)) <= 120
    message = str(ConfigError("a" * 10**6 + "\x1b" + "b" * 10**6))
    assert len(message) <= 8000 and message.endswith("b" * 100)
    assert cut("abc", 3) == "abc"


@pytest.mark.parametrize(
    "value", [10**400, -(10**400), 1e999, float("nan"), "1" * 9999, [[]] * 999]
)
@pytest.mark.parametrize(
    "field", ["rms_norm_eps", "rope_theta", "hidden_size", "num_key_value_heads"]
)
def test_absurd_numbers_of_a_config(field, value):
    with pytest.raises(ConfigError, match=field) as e:
        zoo.config_from_hf(published.config("llama") | {field: value})
    assert len(str(e.value)) < 1000


@pytest.fixture
def folder(tmp_path):
    config = published.config("llama")
    published.write(tmp_path, config, published.random_tensors(config))
    return tmp_path


def change_header(folder, change):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    text = json.dumps(change(header) or header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])


@pytest.mark.parametrize(
    "name", ["a\x1b[2J", "a\0", "x.rotary_emb.inv_freq\n", "a" * 300, "a\u202e"]
)
def test_names_of_tensors(folder, name):
    change_header(
        folder, lambda h: {name if k == "model.norm.weight" else k: v for k, v in h.items()}
    )
    with pytest.raises(InteropError, match="is no name of a tensor") as e:
        load_model(folder)
    assert plain(str(e.value)) == str(e.value) and len(str(e.value)) < 500


def test_only_buffers_of_a_layer_are_ignored(tmp_path):
    config = published.config("llama")
    for name in ("evil.rotary_emb.inv_freq", "model.layers.\u0661.self_attn.rotary_emb.inv_freq"):
        tensors = published.random_tensors(config) | {name: np.ones(3, np.float32)}
        published.write(tmp_path, config, tensors)
        with pytest.raises(InteropError, match="not part of the model"):
            load_model(tmp_path)


@pytest.mark.parametrize("shape", [[2**62] * 300, [10**60], [0] * 17, [1.0], [True]])
def test_shapes(folder, shape):
    change_header(folder, lambda h: h["model.norm.weight"].update(shape=shape))
    with pytest.raises(InteropError, match=r"model\.norm\.weight: bad shape") as e:
        load_model(folder)
    assert len(str(e.value)) < 500


@pytest.mark.parametrize("dtype", [published.BF16, np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_no_numbers(tmp_path, name, value, dtype):
    config = published.config("llama")
    tensors = published.random_tensors(config, dtype=np.dtype(dtype))
    tensors[name].flat[-1] = value
    published.write(tmp_path, config, tensors)
    with pytest.raises(InteropError, match=f"^{name} holds NaN, infinity"):
        load_model(tmp_path)


def test_weights_too_large_for_the_dtype_asked_for(tmp_path):
    config = published.config("llama")
    tensors = published.random_tensors(config, dtype=np.dtype(np.float32))
    tensors["model.norm.weight"][0] = 1e5
    published.write(tmp_path, config, tensors)
    assert load_model(tmp_path)[1]["final_norm"]["scale"][0] == 1e5
    with pytest.raises(InteropError, match=r"model\.norm\.weight holds .* too large for float16"):
        load_model(tmp_path, dtype=np.float16)


# Tokenizers.


def described(**changes):
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [],
        "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
        "model": {"type": "BPE", "vocab": {"a": 0, "é": 1, "aé": 2}, "merges": []}, **changes,
    }  # fmt: skip


def bpe(**changes):
    return {"model": {**described()["model"], **changes}}


def charsmap(text):
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}


def replace(content, times):
    one = {"type": "Replace", "pattern": {"String": "a"}, "content": content}
    return {"normalizer": {"type": "Sequence", "normalizers": [one] * times}}


HOSTILE = {
    "no model": {"model": {}},
    "a panic while it is read": bpe(merges=["a é"], continuing_subword_prefix="éé"),
    "an abort while it is read": bpe(merges=["a é"], continuing_subword_prefix="x"),
    "an allocation of 8 GB": charsmap("/////w=="),
    "a panic while it encodes": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "a frame that names no token": {
        "post_processor": {
            "type": "TemplateProcessing", "pair": [], "special_tokens": {},
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
        }
    },
    "a regular expression without end": {
        "pre_tokenizer": {
            "type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False
        }
    },
    "a normaliser that grows": replace("aa", 9),
    "a normaliser that explodes": replace("a" * 1000, 9),
}  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE.values(), ids=HOSTILE)
def test_tokenizers_are_tried_elsewhere(changes, capfd):
    text = json.dumps(described(**changes))
    with pytest.raises(ConfigError, match=r"^x: not a tokenizer\.json that") as e:
        check_tokenizer(text, "x")
    assert len(str(e.value)) < 2000
    assert capfd.readouterr() == ("", "")  # no panic of the library's on the terminal


def test_a_panic_later_on_is_an_error_too():
    """On a text that no trial has: the library gives up the regular expression, by a panic."""
    split = {
        "type": "Split",
        "pattern": {"Regex": "(q+)+$"},
        "behavior": "Isolated",
        "invert": False,
    }
    end = {"id": 9, "content": "</s>", "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    text = json.dumps(described(pre_tokenizer=split, added_tokens=[end]))
    check_tokenizer(text, "x")
    tokenizer = JsonTokenizer(text, "x")
    for call in (tokenizer.encode, tokenizer.encode_framed, tokenizer.encode_marked):
        with pytest.raises(ConfigError, match=r"x: not a tokenizer\.json that"):
            call("q" * 40 + "b")
    with pytest.raises(ConfigError, match=r"x: not a tokenizer\.json that"):
        tokenizer.encode_batch(["q" * 40 + "b"])


def test_good_tokenizers_pass():
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")
    )
    made.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), tokenizers.normalizers.Replace(" ", "▁")]
    )
    check_tokenizer(made.to_str(), "x")
    check_tokenizer(json.dumps(framed(ByteTokenizer())), "x")


# Two processes.


def hold(path, ready, done):
    with whole_folder(path):
        ready.set()
        done.wait()


def test_two_processes_cannot_write_one_path(tmp_path):
    """The second is told, and takes nothing from the first."""
    context = multiprocessing.get_context("spawn")
    ready, done = context.Event(), context.Event()
    first = context.Process(target=hold, args=(tmp_path / "run", ready, done))
    first.start()
    assert ready.wait(120)
    with (
        pytest.raises(InteropError, match="another process is writing"),
        whole_folder(tmp_path / "run"),
    ):
        pass
    assert [p.name for p in tmp_path.iterdir()] == [".run.moejax-partial"]
    done.set()
    first.join()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_memory_of_a_large_file_is_bounded(tmp_path):
    """50 MB of the costliest JSON that is read: 64 bytes for each empty list of three."""
    data = b'{"a": [' + b"[]," * 2_000_000 + b"0]}"
    tracemalloc.start()
    parse_json(data, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 300e6

"""What the files of a checkpoint say about prompts is read as they mean it, and checked."""

import json

import prompt_case
import pytest
from prompt_case import write

from moejax.config import ConfigError, DataConfig
from moejax.data import DataError
from moejax.data.separators import Separators
from moejax.data.tokenizer import ByteTokenizer, JsonTokenizer, load_tokenizer
from moejax.interop import prompts


@pytest.fixture(scope="module")
def tokenizer():
    return prompt_case.tokenizer()


@pytest.mark.parametrize(
    "files, message",
    [
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config__json": "[1]"}, "expected a JSON object"),
        ({"tokenizer_config__json": {"chat_template": 7}}, "chat_template is not a text"),
        (
            {"generation_config__json": "x" * (prompts.MOST_BYTES + 1)},
            "at most 10,000,000 are read",
        ),
        ({"generation_config__json": {"eos_token_id": 7.5}}, "eos_token_id=7.5 must be a token id"),
        (
            {"generation_config__json": {"eos_token_id": [10**11]}},
            "eos_token_id=.* must be a token id",
        ),
        ({"generation_config__json": {"temperature": "hot"}}, "temperature='hot' must be a number"),
        ({"generation_config__json": {"do_sample": 1}}, "do_sample=1 must be true or false"),
        ({"generation_config__json": {"stop_strings": ["a", 1]}}, "stop_strings=.* must be a text"),
        (
            {"generation_config__json": {"repetition_penalty": 1.1}},
            "repetition_penalty=1.1: moejax",
        ),
        ({"generation_config__json": {"new_in_6": 1}}, "new_in_6=1: .*--ignore_keys=new_in_6"),
        ({"config__json": {"eos_token_id": [-1]}}, r"config.json: eos_token_id=\[-1\] must be"),
        ({"special_tokens_map__json": {"bos_token": 7}}, "bos_token=7 must be a token's text"),
        ({"added_tokens__json": {"<x>": "1"}}, "'<x>' must have a token id, not '1'"),
        ({"tokenizer_config__json": {"added_tokens_decoder": []}}, "must be an object of tokens"),
        (
            {"tokenizer_config__json": {"added_tokens_decoder": {"1": {"content": []}}}},
            "must be a token's text",
        ),
        ({"generation_config__json": {"top_k": 2.5}}, "top_k=2.5 must be a whole number"),
        ({"generation_config__json": {"top_p": 0}}, "top_p=0 must be a number above 0"),
        (
            {"generation_config__json": {"max_new_tokens": True}},
            "max_new_tokens=True must be a pos",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, files, message):
    with pytest.raises(ConfigError, match=message):
        write(tmp_path, **files)


def test_a_prompt_starts_as_its_checkpoint_wants(tmp_path, tokenizer):
    """The separator for runs trained here, else what tokenizer.json itself adds: beside it, `transformers` does
    not read add_bos_token."""
    encode = lambda files, text: prompts.encode_prompt(files, text, tokenizer)  # noqa: E731
    trained = prompts.read_prompt_files(tmp_path / "none")
    assert encode(trained, "Hello a") == [1, 5, 6]
    assert encode(trained, "") == [1]
    # A text may spell a special token; it stays text.
    assert prompts.encode_prompt(trained, "<s>", ByteTokenizer()) == [256, *b"<s>"]
    assert encode(write(tmp_path, tokenizer_config__json={"model_max_length": 1}), "a") == [1, 6]
    assert encode(write(tmp_path, tokenizer_config__json={"add_bos_token": True}), "a") == [1, 6]
    assert encode(write(tmp_path, tokenizer_config__json={"add_bos_token": False}), "a") == [1, 6]
    assert encode(write(tmp_path, generation_config__json={}), "") == [1]


def test_stop_ids_of_the_checkpoint(tmp_path, tokenizer):
    assert prompts.stop_ids(prompts.read_prompt_files(tmp_path / "none"), tokenizer) == (2,)
    for given, want in ((4, (2, 4)), ([4, 2, 3], (2, 3, 4)), (None, (2,))):
        files = write(tmp_path, generation_config__json={"eos_token_id": given})
        assert prompts.stop_ids(files, tokenizer) == want


def test_defaults_of_the_checkpoint():
    none = {"temperature": None, "top_k": None, "top_p": None}
    assert prompts.sampling_options(none, {}, 100) == {
        "temperature": 0.8,
        "top_k": 0,
        "top_p": 0.95,
    }
    published = {"do_sample": True, "temperature": 0.3, "top_p": 0.9}
    assert prompts.sampling_options(none, published, 100) == {
        "temperature": 0.3,
        "top_k": 50,  # the default of `transformers`
        "top_p": 0.9,
    }
    assert prompts.sampling_options(none, {"temperature": 0.3}, 100)["temperature"] == 0
    wide = {"do_sample": True, "top_k": 200}
    assert prompts.sampling_options(none, wide, 100)["top_k"] == 100  # all there are
    given = none | {"temperature": 1.0}
    assert prompts.sampling_options(given, {"temperature": 0.3}, 100)["temperature"] == 1.0


def test_end_tokens_of_every_file(tmp_path, tokenizer):
    files = write(
        tmp_path,
        config__json={"eos_token_id": 3},
        generation_config__json={"eos_token_id": [0]},
        tokenizer_config__json={"eos_token": "<|assistant|>"},
    )
    assert prompts.stop_ids(files, tokenizer) == (0, 2, 3, 4)


def test_a_stop_text_that_is_a_special_token_is_an_id(tmp_path, tokenizer):
    files = prompts.read_prompt_files(tmp_path / "none")
    assert prompts.stop_ids(files, tokenizer, ["Hello", "<|user|>"]) == (2, 3)
    assert prompts.stop_ids(files, ByteTokenizer(), ["<|user|>"]) == (256,)


def test_special_tokens_map_counts_unless_the_newer_file_has_its_tokens(tmp_path):
    old = {"bos_token": "<old>", "add_bos_token": True, "pad_token": None}
    files = write(
        tmp_path, tokenizer_config__json=old, special_tokens_map__json={"bos_token": "<s>"}
    )
    assert files.special == {"bos_token": "<s>"}
    new = {**old, "added_tokens_decoder": {"1": {"content": "<s>", "special": True}}}
    assert write(tmp_path, tokenizer_config__json=new).special == {"bos_token": "<old>"}


@pytest.mark.parametrize(
    "files, message",
    [
        (
            {"tokenizer_config__json": {"eos_token": "<end>"}},
            "'<end>'; in tokenizer.json it is missing",
        ),
        ({"tokenizer_config__json": {"eos_token": "Hello"}}, "it is token 5, and no special one"),
        ({"added_tokens__json": {"<s>": 9}}, "'<s>' with id 9; in tokenizer.json it is token 1"),
        (
            {
                "tokenizer_config__json": {
                    "added_tokens_decoder": {"5": {"content": "Hello", "special": True}}
                }
            },
            "no special one",
        ),
    ],
)
def test_files_that_disagree_with_tokenizer_json(tmp_path, tokenizer, files, message):
    with pytest.raises(ConfigError, match=message):
        prompts.check_tokens(write(tmp_path, **files), tokenizer)


def test_files_that_agree_with_tokenizer_json(tmp_path, tokenizer):
    decoder = {
        "2": {"content": "</s>", "special": True, "lstrip": False},
        "5": {"content": "Hello", "special": False},
    }
    config = {"added_tokens_decoder": decoder, "eos_token": "</s>"}
    prompts.check_tokens(write(tmp_path, tokenizer_config__json=config), tokenizer)


def test_generation_config_is_read_or_named(tmp_path):
    """Caches, beams with one beam, neutral values and null change nothing; limits get a line."""
    harmless = dict.fromkeys(prompts.GENERATION_HARMLESS, "absurd") | prompts.GENERATION_NEUTRAL
    files = write(tmp_path, generation_config__json=harmless | {"x": None, "max_length": 4096})
    assert files.unused() == ["max_length=4096"]
    for key in prompts.GENERATION_NEUTRAL:
        with pytest.raises(ConfigError, match=f"{key}=0.25"):
            write(tmp_path, generation_config__json={key: 0.25})
    folder = files.folder
    assert prompts.read_prompt_files(folder, [key]).generation == {}


@pytest.mark.parametrize(
    "files, want",
    [
        # (begin, end, padding) of the words: <s> is 1, </s> 2, <|user|> 3, <|assistant|> 4.
        ({}, (1, 2, 2)),
        ({"tokenizer_config": {"eos_token": "<|user|>", "pad_token": "</s>"}}, (1, 3, 2)),
        ({"special_tokens_map": {"eos_token": "<|user|>"}}, (1, 3, 3)),
        ({"config": {"eos_token_id": 4}}, (1, 4, 4)),
        ({"config": {"eos_token_id": 4}, "generation_config": {"eos_token_id": [3, 2]}}, (1, 3, 3)),
        ({"config": {"eos_token_id": 99}, "tokenizer_config": {"eos_token": "</s>"}}, (1, 2, 2)),
    ],
)
def test_what_stands_around_a_document_is_the_files_word(tmp_path, tokenizer, files, want):
    found = write(tmp_path, **{f"{name}__json": values for name, values in files.items()})
    assert prompts.separators(found, tokenizer) == want


def test_what_begins_a_document_where_nothing_stands_before_a_text(tmp_path, tokenizer):
    described = json.loads(tokenizer.text) | {"post_processor": None}
    plain = JsonTokenizer(json.dumps(described), "test")
    named = {"bos_token": "<|user|>", "eos_token": "</s>"}
    files = write(tmp_path, tokenizer_config__json=named)
    assert prompts.separators(files, plain) == (3, 2, 2)
    files = write(tmp_path, tokenizer_config__json={"eos_token": "</s>"})
    assert prompts.separators(files, plain) == (2, 2, 2)


def test_a_run_keeps_what_stands_around_its_documents(tmp_path, tokenizer):
    (tmp_path / "tokenizer.json").write_text(tokenizer.text)
    cfg = DataConfig(tokenizer=str(tmp_path / "gone.json"))
    kept = tmp_path / "tokenizer.json"
    assert load_tokenizer(cfg, None, kept).eos_id == 2
    (tmp_path / "separators.json").write_bytes(Separators(3, 4, 2).to_json())
    found = load_tokenizer(cfg, None, kept)
    assert (found.bos_id, found.eos_id, found.pad_id) == (3, 4, 2)
    for text in (
        "{",
        "[]",
        '{"bos_id": 1}',
        '{"bos_id": 1, "eos_id": -1, "pad_id": 0}',
        "[" * 9999,
    ):
        (tmp_path / "separators.json").write_text(text)
        with pytest.raises(DataError, match=r"separators\.json"):
            load_tokenizer(cfg, None, kept)
    (tmp_path / "separators.json").write_bytes(Separators(3, 99, 2).to_json())
    with pytest.raises(DataError, match="are not among its 7 tokens"):
        load_tokenizer(cfg, None, kept)

"""What the files of a checkpoint say about prompts is read as they mean it, and checked."""

import prompt_case
import pytest
from prompt_case import write

from moejax.config import ConfigError
from moejax.data.tokenizer import ByteTokenizer
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
    """The separator for runs trained here; else add_bos_token, else what tokenizer.json itself adds."""
    encode = lambda files, text: prompts.encode_prompt(files, text, tokenizer)  # noqa: E731
    trained = prompts.read_prompt_files(tmp_path / "none")
    assert encode(trained, "Hello a") == [1, 5, 6]
    assert encode(trained, "") == [1]
    # A text may spell a special token; it stays text.
    assert prompts.encode_prompt(trained, "<s>", ByteTokenizer()) == [256, *b"<s>"]
    assert encode(write(tmp_path, tokenizer_config__json={"model_max_length": 1}), "a") == [1, 6]
    assert encode(write(tmp_path, tokenizer_config__json={"add_bos_token": True}), "a") == [1, 6]
    assert encode(write(tmp_path, tokenizer_config__json={"add_bos_token": False}), "a") == [6]


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
        "top_k": 0,
        "top_p": 0.9,
    }
    assert prompts.sampling_options(none, {"temperature": 0.3}, 100)["temperature"] == 0
    wide = {"do_sample": True, "top_k": 200}
    assert prompts.sampling_options(none, wide, 100)["top_k"] == 100  # all there are
    given = none | {"temperature": 1.0}
    assert prompts.sampling_options(given, {"temperature": 0.3}, 100)["temperature"] == 1.0

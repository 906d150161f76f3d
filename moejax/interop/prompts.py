"""What an imported checkpoint says about prompts: chat template, special tokens, sampling defaults.

The files that came with it are kept in its run's folder (`runs.folder.HF`); a run trained here has none of
them, and then a prompt is the start of a document.
"""

import pathlib
from typing import Any, NamedTuple

from moejax.config import ConfigError
from moejax.data.tokenizer import MOST_TOKENS, JsonTokenizer, Tokenizer
from moejax.interop.files import exists, read_bytes, read_json

TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
# What is read of it: type, least, most, whether a list of them will do, in words.
GENERATION_VALUES = {
    "eos_token_id": (int, 0, MOST_TOKENS, True, "a token id, or a list of them"),
    "temperature": (int | float, 0, 1e6, False, "a number from 0 on"),
    "top_k": (int, 0, MOST_TOKENS, False, "a whole number from 0 on"),
    "top_p": (int | float, 1e-9, 1, False, "a number above 0, at most 1"),
    "max_new_tokens": (int, 1, MOST_TOKENS, False, "a positive whole number"),
}
MOST_BYTES = 10_000_000  # of a file here; published ones have a few hundred kB at most
# Sampling where neither the user nor a generation_config.json says anything.
DEFAULTS = {"temperature": 0.8, "top_k": 0, "top_p": 0.95}


class PromptFiles(NamedTuple):
    """Attributes:
    folder: where they were looked for.
    tokenizer_config, generation_config: their content; {} where there is no such file.
    template: the chat template, or None.
    """

    folder: pathlib.Path
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]
    template: str | None


def read_prompt_files(folder: pathlib.Path) -> PromptFiles:
    """The files in `folder`. Raises ConfigError naming a file, or a value, that is not what it should be."""
    tokenizer_config = _read_json(folder, TOKENIZER_CONFIG)
    template = tokenizer_config.get("chat_template")
    if exists(folder, TEMPLATE_FILE):
        try:
            template = read_bytes(folder, TEMPLATE_FILE, MOST_BYTES).decode("utf-8")
        except UnicodeDecodeError as e:
            raise ConfigError(f"{folder / TEMPLATE_FILE} is not text in UTF-8 ({e})") from e
    elif isinstance(template, list):  # several by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if not isinstance(template, str | None):
        raise ConfigError(f"{folder / TOKENIZER_CONFIG}: chat_template is not a text")
    generation_config = _read_json(folder, GENERATION_CONFIG)
    for key, (kind, least, most, several, text) in GENERATION_VALUES.items():
        value = generation_config.get(key)
        values = value if several and isinstance(value, list) else [value]
        if value is not None and not all(
            isinstance(v, kind) and not isinstance(v, bool) and least <= v <= most for v in values
        ):
            raise ConfigError(
                f"{folder / GENERATION_CONFIG}: {key}={value!r} must be {text}; correct it or leave it out"
            )
    return PromptFiles(folder, tokenizer_config, generation_config, template)


def _read_json(folder: pathlib.Path, name: str) -> dict:
    return read_json(folder, name, MOST_BYTES) if exists(folder, name) else {}


def encode_prompt(files: PromptFiles, text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the start of a document: after the separator, or as the checkpoint's files say."""
    published = files.tokenizer_config
    if published and isinstance(tokenizer, JsonTokenizer):
        ids = tokenizer.encode_framed(text)
    else:
        ids = tokenizer.encode(text)
    add_bos = published.get("add_bos_token", not published or ids[:1] == [tokenizer.bos_id])
    ids = ids[1:] if ids[:1] == [tokenizer.bos_id] else ids
    # An empty prompt starts with the separator in any case: there must be something to continue.
    return [tokenizer.bos_id, *ids] if add_bos or not ids else ids


def stop_ids(files: PromptFiles, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's, and those of generation_config.json."""
    more = files.generation_config.get("eos_token_id")
    more = [] if more is None else [more] if isinstance(more, int) else more
    return tuple(sorted({tokenizer.eos_id, *more}))


def sampling_options(
    given: dict[str, Any], published: dict[str, Any], vocab_size: int
) -> dict[str, Any]:
    """temperature, top_k and top_p: as given, else as in a checkpoint's generation_config.json, else
    DEFAULTS. `transformers` reads a file without do_sample as greedy; so do we."""
    options = dict(DEFAULTS)
    if published:
        neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        options = {k: v if published.get(k) is None else published[k] for k, v in neutral.items()}
        options["top_k"] = min(options["top_k"], vocab_size)
        if not published.get("do_sample", False):
            options["temperature"] = 0.0
    return options | {k: v for k, v in given.items() if v is not None}

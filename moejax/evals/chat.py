"""What an imported checkpoint says about prompts: chat template, special tokens, sampling defaults.

The files that came with it lie in `workdir/hf/`; a run trained here has none of them, and then a prompt is
the start of a document.
"""

import json
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

from moejax.config import ConfigError
from moejax.data.tokenizer import MOST_TOKENS, JsonTokenizer, Tokenizer
from moejax.evals import chat_render
from moejax.interop.files import exists, read_bytes, read_json

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
RENDER_SECONDS = 2 * chat_render.CPU_SECONDS  # of wall time

Message = dict[str, str]


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
    tokenizer_config = _read_json(folder, "tokenizer_config.json")
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
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: chat_template is not a text")
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


def check_messages(messages: Any, where: str) -> list[Message]:
    """`messages` if it is a list of {"role": text, "content": text}, else ConfigError."""
    good = isinstance(messages, list) and messages
    good = good and all(
        isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
        for m in messages
    )
    if not good:
        raise ConfigError(
            f'{where} must be a list like [{{"role": "user", "content": "Hello"}}], not empty'
        )
    return messages


def render_chat(files: PromptFiles, messages: list[Message]) -> str:
    """The conversation as the checkpoint's template writes it, ready for the assistant's answer.

    Raises ConfigError if there is no template, or it fails, or it takes too long or too much memory.
    """
    if files.template is None:
        raise ConfigError(
            f"no chat template: neither {files.folder / TEMPLATE_FILE} nor chat_template in "
            f"{files.folder / 'tokenizer_config.json'}; import a chat model, or leave out --chat"
        )
    special = {
        name: token if isinstance(token, str) else token["content"]
        for name, token in files.tokenizer_config.items()
        if name.endswith("_token")
        and (isinstance(token, str) or (isinstance(token, dict) and "content" in token))
    }
    context = {**special, "messages": messages, "add_generation_prompt": True, "tools": None}
    try:
        done = subprocess.run(
            [sys.executable, "-P", chat_render.__file__],
            input=json.dumps({"template": files.template, "context": context}).encode(),
            capture_output=True,
            timeout=RENDER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as e:
        raise ConfigError(
            f"the chat template in {files.folder} did not end in {RENDER_SECONDS} seconds"
        ) from e
    if done.returncode < 0:
        raise ConfigError(
            f"the chat template in {files.folder} took more than {chat_render.CPU_SECONDS} seconds or "
            f"{chat_render.MEMORY_BYTES >> 20} MiB and was ended"
        )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ConfigError(
            f"the chat template in {files.folder} failed: {lines[-1] if lines else '?'}"
        )
    return done.stdout.decode()


def encode_chat(files: PromptFiles, messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids of the rendered conversation; special tokens that the template wrote are recognised."""
    text = render_chat(files, messages)
    if not isinstance(tokenizer, JsonTokenizer):
        raise ConfigError("--chat needs a tokenizer.json with the template's special tokens")
    return tokenizer.encode_marked(text)


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

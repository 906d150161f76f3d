"""Renders a conversation with the chat template of a checkpoint, and encodes it."""

import json
import subprocess
import sys
from typing import Any

from moejax.config import ConfigError
from moejax.data.tokenizer import JsonTokenizer, Tokenizer
from moejax.evals import chat_render
from moejax.interop.prompts import TEMPLATE_FILE, TOKENIZER_CONFIG, PromptFiles

RENDER_SECONDS = 2 * chat_render.CPU_SECONDS  # of wall time

Message = dict[str, str]


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
            f"{files.folder / TOKENIZER_CONFIG}; import a chat model, or leave out --chat"
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

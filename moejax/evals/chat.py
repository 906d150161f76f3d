"""Renders a conversation with the chat template of a checkpoint, and encodes it."""

import json
from typing import Any

from moejax import limited
from moejax.config import ConfigError
from moejax.data.tokenizer import JsonTokenizer, Tokenizer
from moejax.evals import chat_render
from moejax.interop.prompts import TEMPLATE_FILE, TOKENIZER_CONFIG, PromptFiles

SECONDS, MEGABYTES = 5, 1024  # for a template
# It may write this many characters, plus four for each character of the conversation.
MOST_RENDERED = 1_000_000

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

    Raises ConfigError if there is no template, or it fails, writes too much or takes too long.
    """
    if files.template is None:
        raise ConfigError(
            f"no chat template: neither {files.folder / TEMPLATE_FILE} nor chat_template in "
            f"{files.folder / TOKENIZER_CONFIG}; import a chat model, or leave out --chat"
        )
    context = {**files.special, "messages": messages, "add_generation_prompt": True, "tools": None}
    most = MOST_RENDERED + 4 * sum(len(m["content"]) for m in messages)
    request = {"template": files.template, "context": context, "most": most}
    what = f"the chat template in {files.folder}"
    program, data = chat_render.__file__, json.dumps(request).encode()
    return limited.run(program, data, what, seconds=SECONDS, megabytes=MEGABYTES).decode()


def encode_chat(files: PromptFiles, messages: list[Message], tokenizer: Tokenizer) -> list[int]:
    """Token ids of the rendered conversation. Special tokens that the template writes count as such."""
    text = render_chat(files, messages)
    if not isinstance(tokenizer, JsonTokenizer):
        raise ConfigError("--chat needs a tokenizer.json with the template's special tokens")
    return tokenizer.encode_marked(text)

"""`moejax generate`: prompts or a conversation in, text out, streamed where there is one."""

import json
import pathlib

from absl import flags

from moejax.commands.flags import parse_needed
from moejax.config import ConfigError
from moejax.evals import chat

USAGE = """\
usage: moejax generate --workdir=RUN --prompt="def "            continue a text, streaming
       moejax generate --workdir=RUN --prompts_file=FILE        many: a line each, or JSONL with "prompt"
       moejax generate --workdir=RUN --chat --prompt="Hello"    a chat model answers; without a prompt
                                                                it is a conversation at the terminal"""


def _generate_flags() -> flags.FlagValues:
    fv = flags.FlagValues()
    text, whole, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    switch = flags.DEFINE_boolean
    text("workdir", None, "Folder of a run, trained or imported.", flag_values=fv)
    text("prompt", None, "Text to continue; with --chat, what the user says.", flag_values=fv)
    text("prompts_file", None, "Prompts: a line each, or .jsonl with 'prompt'.", flag_values=fv)
    switch("chat", False, "Ask a chat model through its own template.", flag_values=fv)
    text("system", None, "With --chat: the system message.", flag_values=fv)
    text("messages", None, "With --chat: a JSON file of role/content messages.", flag_values=fv)
    whole("max_new", None, "Tokens to write [200, or the model's own].", flag_values=fv)
    real("temperature", None, "0 = greedy [0.8, or the model's own].", flag_values=fv)
    whole("top_k", None, "Sample among the k likeliest; 0 = all.", flag_values=fv)
    real("top_p", None, "Sample within this probability mass [0.95].", flag_values=fv)
    switch("greedy", False, "The same as --temperature=0.", flag_values=fv)
    whole("seed", 0, "The same seed gives the same text.", flag_values=fv)
    flags.DEFINE_multi_string("stop", [], "End at this text; may be repeated.", flag_values=fv)
    flags.DEFINE_list("stop_ids", [], "End at these token ids, too: 2,7.", flag_values=fv)
    whole("batch_size", 8, "Prompts at once.", flag_values=fv)
    switch(
        "speculative", False, "Guess with the MTP head; the greedy text, faster.", flag_values=fv
    )
    text("mesh", None, "Devices per axis: tensor=2,expert=4 [one device].", flag_values=fv)
    switch("stats", False, "Print speeds and the cache's size at the end.", flag_values=fv)
    switch("jsonl", False, "Print a JSON object per prompt.", flag_values=fv)
    return fv


def main(argv: list[str]) -> int:
    """`moejax generate ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = _generate_flags()
    if not parse_needed("generate", USAGE, fv, argv, ("workdir",)):
        return 0
    if fv.batch_size < 1:
        raise ConfigError(f"--batch_size={fv.batch_size} must be at least 1")
    requests = _requests(fv)  # read before the weights: a wrong file is reported at once
    from moejax.evals.writer import Writer

    writer = Writer(
        pathlib.Path(fv.workdir),
        mesh=fv.mesh,
        max_new=fv.max_new,
        temperature=0.0 if fv.greedy or (fv.speculative and not fv.temperature) else fv.temperature,
        top_k=fv.top_k,
        top_p=fv.top_p,
        seed=fv.seed,
        stop_texts=fv.stop,
        stop_ids=_integers(fv.stop_ids),
        speculative_decoding=fv.speculative,
    )
    if requests is None:
        return _converse(fv, writer)
    for start in range(0, len(requests), fv.batch_size):
        batch = requests[start : start + fv.batch_size]
        prompts = [writer.encode(r) for r in batch]
        if len(requests) == 1 and not fv.jsonl:
            if isinstance(batch[0], str):
                print(batch[0], end="", flush=True)
            for piece in writer.write(prompts[0]):
                print(piece, end="", flush=True)
            print()
            continue
        for request, text in zip(batch, writer.write_all(prompts, first_row=start)):
            _print_one(fv, request, text)
    if fv.stats:
        print(writer.stats)
    return 0


def _print_one(fv, request, text: str) -> None:
    if fv.jsonl:
        name = "prompt" if isinstance(request, str) else "messages"
        print(json.dumps({name: request, "text": text}, ensure_ascii=False))
    else:
        shown = request if isinstance(request, str) else f"{request[-1]['content']}\n"
        print(f"{shown}{text}\n{'-' * 40}")


def _converse(fv, writer) -> int:
    """A conversation at the terminal, until the end of input."""
    messages = _opening(fv)
    while True:
        try:
            said = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return 0
        messages.append({"role": "user", "content": said})
        pieces = []
        for piece in writer.write(writer.encode(messages)):
            pieces.append(piece)
            print(piece, end="", flush=True)
        print(f"\n[{writer.stats}]" if fv.stats else "")
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _opening(fv) -> list[chat.Message]:
    return [{"role": "system", "content": _text("--system", fv.system)}] if fv.system else []


def _requests(fv) -> list | None:
    """Prompts (texts, or with --chat lists of messages); None: talk at the terminal."""
    given = [n for n in ("prompt", "prompts_file", "messages") if fv[n].value is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} exclude each other\n{USAGE}")
    if not fv.chat and (fv.messages or fv.system):
        raise ConfigError(f"--messages and --system need --chat\n{USAGE}")
    if fv.messages:
        return [_opening(fv) + _read_messages(pathlib.Path(fv.messages))]
    if fv.prompts_file:
        prompts = read_prompts(pathlib.Path(fv.prompts_file))
    elif fv.chat and fv.prompt is None:
        return None
    else:
        prompts = [_text("--prompt", fv.prompt or "")]
    if not fv.chat:
        return prompts
    return [[*_opening(fv), {"role": "user", "content": p}] for p in prompts]


def _text(name: str, given: str) -> str:
    try:
        given.encode()
    except UnicodeEncodeError as e:
        raise ConfigError(f"{name}={given!a} is not text in UTF-8") from e
    return given


def _read_messages(path: pathlib.Path) -> list[chat.Message]:
    try:
        messages = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"--messages={path} cannot be read as JSON: {e}") from e
    return chat.check_messages(messages, str(path))


def read_prompts(path: pathlib.Path) -> list[str]:
    """A prompt per line; of a .jsonl file, the field "prompt" (or the line itself if it is a string)."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"--prompts_file={path} cannot be read: {e}") from e
    if path.suffix != ".jsonl":
        prompts = [line for line in lines if line]
    else:
        prompts = [_json_prompt(line, path, i + 1) for i, line in enumerate(lines) if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts_file={path} holds no prompt")
    return prompts


def _json_prompt(line: str, path, number: int) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as e:
        raise ConfigError(f"{path}, line {number} is not JSON: {e}") from e
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        raise ConfigError(f'{path}, line {number}: expected {{"prompt": "text"}} or "text"')
    return prompt


def _integers(items: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(i) for i in items)
    except ValueError as e:
        raise ConfigError(f"--stop_ids={','.join(items)} must be numbers: 2,7") from e

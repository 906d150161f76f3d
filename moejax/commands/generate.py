"""`moejax generate`: continues prompts or answers a conversation; streams if there is only one."""

import json
import pathlib
import sys

from absl import flags

from moejax.commands.flags import define_dtype, define_intervene, define_step, parse_needed
from moejax.config import ConfigError
from moejax.data import DataError, sources
from moejax.evals import chat
from moejax.text import shown

USAGE = """\
usage: moejax generate --workdir=RUN --prompt="def "            continue a text, streaming
       moejax generate --workdir=RUN --prompts_file=FILE        many: a line each, or JSONL with "prompt"
       moejax generate --workdir=RUN --chat --prompt="Hello"    ask a chat model; without a prompt,
                                                                talk to it at the terminal
       moejax generate --workdir=RUN --replay=TRACE --prompt=.. the routes of a traced text (moejax routes)"""


def _generate_flags() -> flags.FlagValues:
    fv = flags.FlagValues()
    text, whole, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    switch = flags.DEFINE_boolean
    text("workdir", None, "Folder of a run, trained or imported.", flag_values=fv)
    text("prompt", None, "Text to continue; with --chat, what the user says.", flag_values=fv)
    text("prompts_file", None, "Prompts: a line each, or JSON with 'prompt'.", flag_values=fv)
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
    flags.DEFINE_list("stop_ids", [], "Also end at these token ids: 2,7.", flag_values=fv)
    text("replay", None, "The trace of a text (moejax routes): take its routes.", flag_values=fv)
    whole("batch_size", 8, "Prompts at once.", flag_values=fv)
    switch(
        "speculative",
        False,
        "Decode greedily with guesses of the MTP head: the same text.",
        flag_values=fv,
    )
    text("mesh", None, "Devices per axis: tensor=2,expert=4 [one device].", flag_values=fv)
    define_step(fv)
    define_dtype(fv)
    define_intervene(fv)
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
    if fv.greedy and fv.temperature:
        raise ConfigError(f"--greedy and --temperature={fv.temperature} contradict each other")
    if fv.replay is not None:
        _check_replay(fv)
    requests = _requests(fv)  # read before the weights: a wrong file is reported at once
    from moejax.evals.intervene_text import parse
    from moejax.evals.writer import Writer

    writer = Writer(
        pathlib.Path(fv.workdir),
        mesh=fv.mesh,
        step=fv.step,
        dtype=fv.dtype,
        max_new=fv.max_new,
        temperature=0.0 if fv.greedy or (fv.speculative and not fv.temperature) else fv.temperature,
        top_k=fv.top_k,
        top_p=fv.top_p,
        interventions=parse(fv.intervene) if fv.intervene else (),
        seed=fv.seed,
        stop_texts=fv.stop,
        stop_ids=_integers(fv.stop_ids),
        speculative_decoding=fv.speculative,
        replay=None if fv.replay is None else pathlib.Path(fv.replay),
    )
    if requests is None:
        return _converse(fv, writer)
    if len(requests) == 1 and not fv.jsonl:
        [request] = requests
        if isinstance(request, ConfigError):
            raise request
        prompt = writer.encode(request)
        if isinstance(request, str):
            print(request, end="", flush=True)
        for piece in writer.write(prompt):
            print(piece, end="", flush=True)
        print()
        failed = 0
    else:
        failed = _write_many(fv, writer, requests)
    if writer.left is not None:
        print(
            f"moejax generate: token {writer.left} is not that of {fv.replay}: the text ends there",
            file=sys.stderr,
        )
    if fv.stats:
        print(writer.stats)
    return 1 if failed else 0


def _check_replay(fv) -> None:
    """ConfigError for what does not go with --replay."""
    if fv.prompt is None:
        raise ConfigError("--replay needs the --prompt of the text that was traced")
    for name in ("speculative", "intervene"):
        if fv[name].value:
            raise ConfigError(f"--replay and --{name} cannot be used together")


def _write_many(fv, writer, requests: list) -> int:
    """Print the continuation of each request. Returns the number of requests without one."""
    failed = 0
    for start in range(0, len(requests), fv.batch_size):
        batch = requests[start : start + fv.batch_size]
        texts = writer.write_each(batch, start)
        for number, (request, text) in enumerate(zip(batch, texts), start + 1):
            if isinstance(text, ConfigError):
                failed += 1
                # A prompt that could not be read names its own place.
                of = "" if text is request else f" {shown(request)}"
                text = ConfigError(f"prompt {number}{of}: {text}")
            _print_one(fv, request, text)
    if failed:
        print(f"{failed} of {len(requests)} prompts have no continuation", file=sys.stderr)
    return failed


def _print_one(fv, request, text: str | ConfigError) -> None:
    if fv.jsonl:
        name = "prompt" if isinstance(request, str | ConfigError) else "messages"
        given = None if isinstance(request, ConfigError) else request
        result = {"error": str(text)} if isinstance(text, ConfigError) else {"text": text}
        print(json.dumps({name: given, **result}, ensure_ascii=False))
    elif isinstance(text, ConfigError):
        print(f"moejax generate: {text}", file=sys.stderr)
    else:
        said = request if isinstance(request, str) else f"{request[-1]['content']}\n"
        print(f"{said}{text}\n{'-' * 40}")


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
    """The prompts: texts, or with --chat lists of messages; an error for one that cannot be read. None: talk at
    the terminal."""
    given = [n for n in ("prompt", "prompts_file", "messages") if fv[n].value is not None]
    if len(given) > 1:
        raise ConfigError(f"--{given[0]} and --{given[1]} cannot be used together\n{USAGE}")
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
    return [
        p if isinstance(p, ConfigError) else [*_opening(fv), {"role": "user", "content": p}]
        for p in prompts
    ]


def _text(name: str, given: str) -> str:
    try:
        given.encode()
    except UnicodeEncodeError as e:
        raise ConfigError(f"{name}={given!a} is not text in UTF-8") from e
    return given


def _read_messages(path: pathlib.Path) -> list[chat.Message]:
    try:
        messages = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"--messages={path} cannot be read as JSON: {e}") from e
    return chat.check_messages(messages, str(path))


def read_prompts(path: pathlib.Path) -> list[str | ConfigError]:
    """Read a prompt per line; from JSON (lines, or one array) the field "prompt", or the value if it is text.

    Names, compression and lines are as in `moejax.data.sources`. Blank lines are skipped, and so is the \\r of
    a file from Windows. A prompt that cannot be read is returned as its error, with its place.

    Raises ConfigError for a file that cannot be read, or holds no prompt.
    """
    file = str(path)
    try:
        kind = sources.kind_of(file)
        if kind == "parquet":
            raise DataError(f"{file}: prompts are text or JSON, not Parquet")
        if kind == "text":
            lines = [text for _, text in sources.text_lines(file)]
            prompts: list[str | ConfigError] = [
                t if isinstance(t, DataError) else t.removesuffix("\r") for t in lines
            ]
        else:
            values = sources.json_values(file, kind)
            prompts = [_json_prompt(value, f"{file}:{number}") for number, value in values]
    except DataError as e:
        raise ConfigError(f"--prompts_file: {e}") from e
    if not prompts:
        raise ConfigError(f"--prompts_file={path} has no prompts")
    return prompts


def _json_prompt(value: object, where: str) -> str | ConfigError:
    if isinstance(value, ConfigError):
        return value
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str):
        return ConfigError(f'{where}: expected {{"prompt": "text"}} or "text"')
    try:
        return _text(where, prompt)
    except ConfigError as e:
        return e


def _integers(items: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(i) for i in items)
    except ValueError as e:
        raise ConfigError(f"--stop_ids={','.join(items)} must be numbers: 2,7") from e

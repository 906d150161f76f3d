"""Text in, text out: the generate command and what it is made of."""

import json

import pytest

from moejax.__main__ import main
from moejax.commands.generate import read_prompts
from moejax.config import ConfigError
from moejax.data.tokenizer import ByteTokenizer
from moejax.evals.writer import StoppingText


def say(text: str, stops, size: int = 1) -> tuple[str, bool]:
    row = StoppingText(ByteTokenizer(), stops)
    ids = list(text.encode())
    out = "".join(row.push(ids[i : i + size]) for i in range(0, len(ids), size))
    return out + row.flush(), row.stopped


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize(
    "text, stops, want",
    [
        ("one. two", ["."], "one"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("aab aac", ["aac"], "aab "),
        ("aaab", ["aab"], "a"),
        ("x§y end", ["§"], "x"),
        ("both b a", ["a", "b "], "both "),
        ("never", ["stop", ""], "never"),
        ("almost sto", ["stop"], "almost sto"),
    ],
)
def test_text_ends_before_a_stop_however_it_arrives(text, stops, want, size):
    assert say(text, stops, size) == (want, want != text)


def test_what_may_begin_a_stop_is_held_back_and_no_more():
    row = StoppingText(ByteTokenizer(), ["END"])
    assert row.push(b"ab E") == "ab "
    assert row.push(b"N") == ""
    assert row.push(b"x") == "ENx"
    assert row.push([300, 999]) == ""  # a model may be wider than its tokenizer


def test_prompts_files(tmp_path):
    text, lines = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("one\n\ntwo ü\n")
    lines.write_text('{"prompt": "one"}\n"two\\nlines"\n')
    assert read_prompts(text) == ["one", "two ü"]
    assert read_prompts(lines) == ["one", "two\nlines"]
    for content, message in (
        ('{"text": 1}', "line 1: expected"),
        ('"a"\n{', "line 2 is not JSON"),
        ("", "holds no prompt"),
    ):
        lines.write_text(content)
        with pytest.raises(ConfigError, match=message):
            read_prompts(lines)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none")


def command(capsys, *argv) -> str:
    assert main(["generate", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_generate_command(trained, tmp_path, capsys):
    """One prompt streams; many give the same texts, whatever the batch; stops cut; a seed repeats."""
    flags = [f"--workdir={trained}", "--max_new=12", "--temperature=1", "--seed=3"]
    prompts = tmp_path / "p.txt"
    prompts.write_text("def \nthe\nx = 1\n")
    one = command(capsys, *flags, "--prompt=def ", "--stats")
    assert one.startswith("def ") and "prefill 5 tokens" in one and "cache 0" in one
    together, apart = (
        command(capsys, *flags, f"--prompts_file={prompts}", "--jsonl", f"--batch_size={n}")
        for n in (3, 1)
    )
    assert together == apart
    rows = [json.loads(line) for line in together.splitlines()]
    assert [r["prompt"] for r in rows] == ["def ", "the", "x = 1"]
    first = one.rsplit("\n", 2)[0].removeprefix("def ")
    assert rows[0]["text"] == first and len(first) > 2
    cut = command(capsys, *flags, "--prompt=def ", f"--stop={first[2]}")
    assert cut == f"def {first[: first.index(first[2])]}\n"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--prompt=a"], "needs --workdir"),
        (["--workdir={}", "--prompt=a", "--prompts_file=b"], "exclude each other"),
        (["--workdir={}", "--system=a"], "need --chat"),
        (["--workdir={}", "--chat", "--prompt=a"], "no chat template"),
        (["--workdir={}", "--max_new=100000"], "max_new may be 1 to"),
        (["--workdir={}", "--speculative"], "mtp_depth=0"),
        (["--workdir={}", "--stop_ids=a"], "must be numbers"),
        (
            ["--workdir={}", "--stop_ids=99999999999"],
            "99999999999 is not a token id; they go from 0 to",
        ),
        (["--workdir={}", "--temperature=nan"], "temperature=nan must be >= 0"),
        (["--workdir={}", "--prompt=a\udcff"], "is not text in UTF-8"),
        (["--workdir={}", "--mesh=tensor=3"], "does not divide"),
        (["--workdir={}", "--mesh=tensor=16"], "needs 16 devices"),
        (["--workdir={}", "--batch_size=0"], "must be at least 1"),
        (["--workdir={}", "--temperatur=1"], "Unknown command line flag"),
        (["--workdir={}/none"], "is not the folder of a run"),
    ],
)
def test_bad_requests_are_answered(trained, capsys, argv, message):
    assert main(["generate", *(a.format(trained) for a in argv)]) == 2
    assert message in capsys.readouterr().err

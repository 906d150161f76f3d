"""Text in, text out: the generate command and what it is made of."""

import gzip
import json
import shutil

import pytest
from prompt_case import write

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
    text.write_bytes("\ufeffone\x0c\u2028more\r\n\n \ntwo \x85ü\n".encode())
    lines.write_bytes('{"prompt": "a\u2028b"}\n"two\\nlines"\n'.encode())
    assert read_prompts(text) == ["one\x0c\u2028more", "two \x85ü"]
    assert read_prompts(lines) == ["a\u2028b", "two\nlines"]
    (tmp_path / "p.json.gz").write_bytes(gzip.compress(b'[{"prompt": "one"}, "two"]'))
    assert read_prompts(tmp_path / "p.json.gz") == ["one", "two"]
    for name, content, message in (
        ("p.jsonl", b"", "p.jsonl has no prompts"),
        ("p.txt", b" \n\t\n", "p.txt has no prompts"),
        ("p.json", b'["a"', "the array does not end"),
        ("p.csv", b"a", ".csv files cannot be read"),
        ("none", None, "none: cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_prompts(tmp_path / name)


def test_a_bad_line_of_a_prompts_file_costs_only_itself(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'"a"\n{"text": 1}\n{\n"\xff"\n"\\ud800"\n{"prompt": "b"}')
    first, *bad, last = read_prompts(file)
    assert (first, last) == ("a", "b")
    for number, (error, message) in enumerate(
        zip(bad, ["expected", "not JSON", "not UTF-8", "not text in UTF-8"], strict=True), 2
    ):
        assert isinstance(error, ConfigError)
        assert f"p.jsonl:{number}" in str(error) and message in str(error)


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


def test_rows_do_not_depend_on_their_neighbours(trained, tmp_path, capsys):
    """A long prompt shortens no other's text; one that does not fit, or cannot be read, costs only itself."""
    lines = ["short", "long " * 810, "x" * 5000, 7, "the end"]
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["generate", f"--workdir={trained}", "--temperature=1", "--seed=3", "--jsonl"]
    write(trained, generation_config__json={"do_sample": True, "max_new_tokens": 60})
    try:
        outputs = []
        for batch_size in (5, 1, 2):
            assert main([*flags, f"--prompts_file={file}", f"--batch_size={batch_size}"]) == 1
            out, err = capsys.readouterr()
            assert "2 of 5 prompts have no continuation" in err
            outputs.append([json.loads(line) for line in out.split("\n") if line])
        for row in outputs[0]:
            assert set(row) in ({"prompt", "text"}, {"prompt", "error"})
        texts = [[row.get("text") for row in rows] for rows in outputs]
        assert texts[0] == texts[1] == texts[2] and texts[0][2:4] == [None, None]
        # 60 tokens fit beside a short prompt, and 45 beside one of 4,051 of the 4,096.
        tokens = [len(text) for text in texts[0] if text]  # a character is a token or more
        assert tokens[1] <= 45 < tokens[0]
        too_long, unread = (outputs[0][i]["error"] for i in (2, 3))
        assert too_long.startswith("prompt 3 'xxx") and "5001 prompt tokens" in too_long
        assert unread.startswith(f"prompt 4: {file}:4: expected")
        assert main([*flags[:-1], f"--prompts_file={file}"]) == 1
        out, err = capsys.readouterr()
        assert out.count("-" * 40) == 3 and "prompt 3 'xxx" in err
    finally:
        shutil.rmtree(trained / "hf")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--prompt=a"], "needs --workdir"),
        (["--workdir={}", "--prompt=a", "--prompts_file=b"], "cannot be used together"),
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
        (
            ["--workdir={}", "--temperatur=1"],
            "unknown flag --temperatur=1; did you mean --temperature?",
        ),
        (["--workdir={}/none"], "is not the folder of a run"),
    ],
)
def test_bad_requests_are_answered(trained, capsys, argv, message):
    assert main(["generate", *(a.format(trained) for a in argv)]) == 2
    assert message in capsys.readouterr().err

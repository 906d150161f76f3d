"""Tries out a tokenizer.json from strangers. `tokenizer_check` runs this file as a separate process.

Many broken files make the library's Rust code panic, abort the process or ask for all memory, and a
normaliser may make a text a million times as long.

stdin: the file; stdout: nothing. Exit code 1: stderr's last line says why.
"""

import sys

import tokenizers

# Many scripts, one repeated character, and characters that some tokenizers treat specially.
PROBES = (
    "",
    "a",
    " Hello,  world!\n\t1234567890 (don't) <s></s> [UNK] ##x ▁x \r\n",
    *(c * 256 + "!" for c in "a0 \n"),
    "".join(map(chr, range(0x20, 0x250))),
    "é ñ ß Ω Ж א ع क 中文 日本語 한국어 \u200d\u0301 🙂 \ufb01 \u3000 \x00",
)
MOST_GROWTH = 64  # tokens for a byte of text; a byte is one or two in published files


def check(text: str) -> None:
    tokenizer = tokenizers.Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for marked in (True, False):
        tokenizer.encode_special_tokens = marked
        for probe in PROBES:
            ids = tokenizer.encode(probe, add_special_tokens=marked).ids
            if len(ids) > MOST_GROWTH * (len(probe.encode()) + 1):
                raise ValueError(f"a text of {len(probe)} characters becomes {len(ids):,} tokens")
            again = tokenizer.decode(ids)
            if len(again) > MOST_GROWTH * (len(probe) + 1):
                raise ValueError(f"{len(ids)} tokens become {len(again):,} characters")
    tokenizer.decode(sorted(tokenizer.get_vocab().values())[:1000])


def main() -> int:
    try:
        check(sys.stdin.buffer.read().decode("utf-8"))
    except BaseException as e:  # a panic is not an Exception
        message = str(e).strip().splitlines() or [type(e).__name__]
        print(message[0][:1000], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

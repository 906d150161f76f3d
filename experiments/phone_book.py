"""How many random facts do a mixture and a dense model of the same active size remember, as total size
grows?

    python experiments/phone_book.py runs/phone_book.jsonl
    moejax sweep --config=experiments/phone_book.py --workdir=runs/phone_book --jobs=2

The first command writes a phone book: 20,000 made-up names, each with seven random digits, in pages of 16
random entries. A number cannot be guessed: it takes 7 log2(10) = 23.3 bits, or none if it is remembered.
Every entry is on many pages, so held-out pages have known entries, and the held-out loss says how many bits
of a number are missing: what a model without any memory loses per entry, less what this one loses.

`dense` and `experts-E` use the same hidden units for each token; `experts-E` has E times as many routed
ones.

Not run yet.
"""

import dataclasses
import json
import pathlib
import random
import sys

from small import get_config as small_config

from moejax.config_io import from_config_dict, to_config_dict

ENTRIES, PAGES, PER_PAGE = 20_000, 30_000, 16
BOOK = "runs/phone_book.jsonl"


def get_config(variant: str = "moe"):
    cfg = from_config_dict(small_config(variant))
    return to_config_dict(
        dataclasses.replace(
            cfg,
            name=f"phone-book-{variant}",
            data=dataclasses.replace(
                cfg.data,
                sources=(f"book={BOOK}",),
                tokenizer="byte",
                vocab_size=4096,
                seq_len=256,
                validation_fraction=0.02,
            ),
            train=dataclasses.replace(cfg.train, steps=600, eval_every=600, checkpoint_every=600),
        )
    )


def get_sweep():
    return {
        "variants": {
            "dense": {"variant": "dense"},
            **{f"experts-{e}": {"model.moe.num_experts": e} for e in (4, 16, 64)},
        },
        "seeds": (0, 1, 2),
    }


def write_book(path: pathlib.Path, seed: int = 0) -> None:
    """Write the pages, one JSON line each."""
    rng = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    names: set[str] = set()
    while len(names) < ENTRIES:
        names.add("".join(rng.choices(syllables, k=3)))
    book = [f"{name} {rng.randrange(10**7):07}" for name in sorted(names)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as f:
        for _ in range(PAGES):
            f.write(json.dumps({"text": "\n".join(rng.choices(book, k=PER_PAGE)) + "\n"}) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python experiments/phone_book.py {BOOK}")
    write_book(pathlib.Path(sys.argv[1]))

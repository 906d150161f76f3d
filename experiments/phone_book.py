"""How many random facts do a mixture and a dense model of the same active size remember, as total size
grows?

    python experiments/phone_book.py runs/phone_book.jsonl
    moejax sweep --config=experiments/phone_book.py --workdir=runs/phone_book --jobs=2

The first command writes a phone book: 1,000 made-up names, each with seven random digits, in pages of 16
random entries. Neither can be guessed. Every entry is on many pages, so held-out pages have known entries.
Who knows the alphabet of names and nothing else loses 3 ln 70 + 7 ln 10 = 28.9 nats for an entry of 15 bytes,
1.924 a byte; who knows the book loses ln 1000 = 6.9, 0.461 a byte. In between, an entry's remembered bits are
15 (1.924 - loss) / ln 2, of 31.7.

Muon trains here: with AdamW, and a book of 20,000 entries, no model remembered anything (docs/log.md).

`dense` and `experts-E` use the same hidden units for each token; `experts-E` has E times as many routed
ones.

Result, seeds 0 to 2, held-out loss (interval of the difference: Student's t, 95%, paired by seed):

                loss    bits of 31.7  parameters  beside dense
    dense       0.7204  26.0          0.632M
    experts-4   0.8159  24.0          0.633M      +0.096 (-0.045 .. +0.236)
    experts-16  0.7562  25.3          1.226M      +0.036 (-0.171 .. +0.242)
    experts-64  0.7345  25.7          3.598M      +0.014 (-0.291 .. +0.319)

More experts remember more, but no mixture remembers more than the dense model: what limits memory here are
the steps, and not the parameters, of which even the dense model has 20 for each bit of the book. `experts-4`,
which uses all of its experts, is worse than dense with every seed. A book that fills the dense model would be
a hundred times as large, and so would the run. A run takes 165 to 260 s on one core.
"""

import dataclasses
import json
import pathlib
import random
import sys

from small import get_config as small_config

from moejax.config_io import from_config_dict, to_config_dict

ENTRIES, PAGES, PER_PAGE = 1_000, 8_000, 16
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
            optimizer=dataclasses.replace(
                cfg.optimizer, name="muon", consistent_rms=0.2, learning_rate=0.004
            ),
            train=dataclasses.replace(cfg.train, steps=400, eval_every=400, checkpoint_every=400),
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

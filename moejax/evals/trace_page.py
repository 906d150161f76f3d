"""A trace as one self-contained page: the text coloured by each token's first expert, a layer at a time."""

import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import jinja2
import numpy as np

from moejax.evals.trace import Records
from moejax.text import plain

MOST_TOKENS = 4000
MOST_NUMBERS = 2_000_000  # experts and weights on the page: browsers stay quick
COLOURS, STYLES = 9, 4  # 36 looks; see trace.html


class Token(NamedTuple):
    """A token as the page shows it.

    Attributes:
      text: what is written; "" for a token without one.
      look: number of its first expert's look in the first layer, or -1.
      title: its experts in the first layer, for a browser without scripts.
      document: whether a document begins here.
    """

    text: str
    look: int
    title: str
    document: bool


def write_page(
    path: pathlib.Path, header: dict, pieces: Iterable[Records], texts: list[str]
) -> tuple[int, bool]:
    """Write the page. Returns the number of tokens on it, and whether there were more."""
    layers, k = len(header["layers"]), header["experts_per_token"]
    most = max(1, min(MOST_TOKENS, MOST_NUMBERS // (2 * layers * k)))
    kept, more = [], False
    for records in pieces:
        room = most - sum(len(r.token_N) for r in kept)
        more = len(records.token_N) > room
        kept.append(records.first(room))
        if more:
            break
    records = Records(
        *(None if f[0] is None else np.concatenate(f) for f in zip(*kept))  # pyright: ignore
    )
    path.write_text(page(header, records, texts, more), "utf-8")
    return len(records.token_N), more


def page(header: dict, records: Records, texts: list[str], more: bool) -> str:
    """The page as HTML. Everything that comes from data is escaped."""
    looks_LE, shares = looks(records.experts_NLK)
    here = pathlib.Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("trace.html").render(
        header=header,
        tokens=_tokens(records, looks_LE, texts),
        more=more,
        count=len(records.token_N),
        legend=shares[0],
        data=_data(header, records, looks_LE, shares),
        colours=COLOURS,
    )


def looks(experts_NLK: np.ndarray) -> tuple[list[dict[int, int]], list[list[tuple[int, int, int]]]]:
    """For each layer, expert -> number of its look, the most frequent first experts first; and the legend:
    (expert, look, tokens whose first expert it is) in that order. Experts beyond the last look share it."""
    numbers, legends = [], []
    for layer in range(experts_NLK.shape[1]):
        first_N = experts_NLK[:, layer, 0]
        expert, count = np.unique(first_N[first_N >= 0], return_counts=True)
        order = np.argsort(-count, kind="stable")
        last = COLOURS * STYLES - 1
        legend = [(int(expert[o]), min(rank, last), int(count[o])) for rank, o in enumerate(order)]
        legends.append(legend)
        numbers.append({e: look for e, look, _ in legend})
    return numbers, legends


def _tokens(records: Records, looks_LE, texts: list[str]) -> list[Token]:
    out, before = [], None
    for i, token in enumerate(records.token_N.tolist()):
        text = plain(texts[token]) if token < len(texts) else ""
        at = (int(records.row_N[i]), int(records.document_N[i]))
        experts = records.experts_NLK[i, 0].tolist()
        title = ", ".join(f"expert {e}" for e in experts if e >= 0) or "no expert"
        out.append(Token(text, looks_LE[0].get(experts[0], -1), title, before not in (None, at)))
        before = at
    return out


def _data(header: dict, records: Records, looks_LE, shares) -> dict[str, Any]:
    """What the script reads. Numbers alone, but for names of special experts."""

    def flat(values: np.ndarray | None, digits: int) -> list | None:
        if values is None:
            return None
        rounded = np.round(values.astype(np.float64), digits).reshape(-1).tolist()
        return [None if v != v else v for v in rounded]

    return {
        "layers": header["layers"],
        "k": int(records.experts_NLK.shape[2]),
        "specials": header["special_experts"],
        "num_experts": header["num_experts"],
        "tokens": records.token_N.tolist(),
        "experts": records.experts_NLK.reshape(-1).tolist(),
        "weights": flat(records.weights_NLK, 3),
        "margins": flat(records.margin_NL, 4),
        "legends": shares,
    }

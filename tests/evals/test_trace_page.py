"""The page of routes: whole, alone, hostile text kept as text; and in a browser, where there is one."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from moejax.commands import routes
from moejax.evals import trace_page
from moejax.evals.trace import Records

HEADER = {
    "model": "<b>tiny</b>",
    "step": 3,
    "router": "token_choice",
    "num_experts": 4,
    "special_experts": ["zero"],
    "experts_per_token": 2,
    "layers": [0, 2],
    "num_layers": 3,
}
TEXTS = ["a", "\n", "</script><script>alert(1)</script>", ""]
# Expert 1 is first for three tokens of layer 0; token 3 has none there, token 2 the special expert 4.
EXPERTS = [
    [[1, 0], [3, 2]],
    [[1, 2], [3, 1]],
    [[4, 1], [0, 2]],
    [[-1, -1], [0, 3]],
    [[1, 3], [2, 0]],
]
RECORDS = Records(
    np.array([0, 0, 0, 0, 1]),
    np.ones(5, int),
    np.array([0, 1, 2, 3, 0]),
    np.array(EXPERTS),
    np.full((5, 2, 2), 0.25, np.float32),
    np.array([[0.5, np.nan]] * 5, np.float32),
)


def test_page_is_whole_and_alone():
    page = trace_page.page(HEADER, RECORDS, TEXTS, more=False)
    assert not re.search(r"(src|href)=|https?://|url\(|@import", page)
    assert page.count("<script") == 2 and "alert(1)" in page  # as text, twice escaped
    assert "<b>tiny" not in page and "&lt;b&gt;tiny" in page
    tokens = re.findall(r'<i( data-look="(\d+)")? title="([^"]*)"[^>]*>([^<]*)</i>', page)
    assert [html.unescape(t[3]) for t in tokens] == ["a", "⏎\n", TEXTS[2], "·", "a"]
    assert [t[1] for t in tokens] == ["0", "0", "1", "", "0"]
    assert tokens[3][2] == "no expert" and tokens[0][2] == "expert 1, expert 0"
    assert page.count("<hr>") == 1  # another row begins
    [data] = re.findall(r'id="data">(.*?)</script>', page)
    data = json.loads(data)
    assert data["experts"] == np.array(EXPERTS).reshape(-1).tolist() and data["k"] == 2
    assert data["margins"][:2] == [0.5, None] and data["legends"][0] == [[1, 0, 3], [4, 1, 1]]


def test_a_long_text_is_cut_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(trace_page, "MOST_TOKENS", 7)

    def pieces():
        yield RECORDS
        yield RECORDS
        raise AssertionError("reads on")

    assert trace_page.write_page(tmp_path / "p.html", HEADER, pieces(), TEXTS) == (7, True)
    assert "The first 7 tokens of a longer text" in (tmp_path / "p.html").read_text()
    two = trace_page.write_page(tmp_path / "p.html", HEADER, iter([RECORDS]), TEXTS)
    assert two == (5, False) and "5 tokens." in (tmp_path / "p.html").read_text()


def test_more_experts_than_looks_share_the_last():
    experts = np.arange(50)[:, None, None]
    numbers, legends = trace_page.looks(np.concatenate([experts, experts[:1]]))
    assert legends[0][0] == (0, 0, 2) and len(legends[0]) == 50
    assert max(numbers[0].values()) == 35 and numbers[0][49] == 35


# --------------------------------------------------------------------------------------------------
# In a browser.

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), ""
)


def seen(page, address: str) -> str:
    """The page's elements after its scripts have run at `#address`."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000"]
    profile = page.parent / "profile"
    where = [f"--user-data-dir={profile}", "--dump-dom", f"file://{page}#{address}"]
    done = subprocess.run([CHROMIUM, *flags, *where], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.product
@pytest.mark.skipif(not CHROMIUM, reason="no chromium on PATH: apt-get install chromium")
def test_layers_experts_and_tokens_in_a_browser(trained, tmp_path):
    path = tmp_path / "p.html"
    path.write_text(trace_page.page(HEADER, RECORDS, TEXTS, more=False))
    dom = seen(path, "")
    assert [_look(t) for t in _tokens(dom)] == ["0", "0", "1", None, "0"]
    dom = seen(path, "layer=2&expert=2&token=2")
    looks = _tokens(dom)
    # In layer 2 experts 3, 3, 0, 0, 2 are first; expert 2 is second for tokens 0 and 2.
    assert [_look(t) for t in looks] == ["1", "1", "0", "0", "2"]
    assert ["hit" in t for t in looks] == [True, False, True, False, True]
    assert ["later" in t for t in looks] == [True, False, True, False, False]
    card = html.unescape(re.sub(r"<[^>]+>", " ", re.search(r'id="card".*?</table>', dom, re.S)[0]))
    assert (
        "zero (4): 0.250 · 1: 0.250" in card and "0: 0.250 · 2: 0.250" in card and "0.5000" in card
    )
    assert "<script>alert" not in dom.replace("&lt;", "")  # nothing of the text became an element
    out = tmp_path / "run.html"
    assert routes.main([f"--workdir={trained}", "--text=abc 123", f"--out={out}"]) == 0
    assert "token 3" in seen(out, "layer=1&token=3")


def _tokens(dom: str) -> list[str]:
    return re.findall(r"<i [^>]*>", re.search(r'<div id="text".*?</div>', dom, re.S)[0])


def _look(tag: str) -> str | None:
    found = re.search(r'data-look="(\d+)"', tag)
    return found and found[1]

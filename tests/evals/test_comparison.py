"""Comparing runs: what is a group, which numbers count, what is refused, and what is said."""

import csv
import dataclasses
import io
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from run_folders import BASE, changed, write_run, write_sweep

from moejax.commands.compare import main
from moejax.config import ConfigError
from moejax.cost.receipt import model_flops_per_token
from moejax.evals.comparison import compare
from moejax.evals.comparison_page import lines, page, step_seconds
from moejax.evals.comparison_plot import picture
from moejax.evals.comparison_tables import as_data, difference_table, run_table, seeds_table, tables
from moejax.evals.run_groups import read_run
from moejax.text import render


def shown(c) -> str:
    return render(tables(c))


def test_a_sweep_is_compared_by_variant_and_seed(tmp_path):
    root = write_sweep(tmp_path / "s", {"base": [4.0, 5.0, 6.0], "new": [3.9, 4.8, 5.7]})
    (root / "sweep.json").write_text(json.dumps({"baseline": "new", "variants": {"base": {}}}))
    c = compare([root])
    assert [r.name for r in c.results] == ["new", "base"]  # the sweep's own baseline first
    c = compare([root], baseline="base")
    base, new = c.results
    assert base.means["loss"] == 5.0 and base.error == pytest.approx(1 / math.sqrt(3))
    assert new.difference is not None
    assert new.difference.each == pytest.approx((-0.1, -0.2, -0.3))
    assert new.difference.mean == pytest.approx(-0.2)
    # s = 0.1; t(0.975, 2) = 4.3027: -0.2 -+ 4.3027 * 0.1 / sqrt(3) leaves out 0 only from below 0.2484.
    assert new.difference.student == pytest.approx((-0.2 - 0.24842, -0.2 + 0.24842), abs=1e-4)
    assert c.config == {"optimizer.learning_rate": ("0.001", "0.002")}
    assert new.means["max_vio"] == 1.0 and new.means["tokens_per_second"] == 200.0
    per_token = model_flops_per_token(BASE)
    assert new.cost["tokens"] == 2000 and new.cost["flops"] == 2000 * per_token
    text = shown(c)
    assert "too few seeds: about 5 would show it" in text and "-0.2000" in text
    # Of a table of t (see test_statistics): n = 4 gives 4.161 / 2 = 2.08 > 0.2 / 0.1, n = 5 3.717 / √5 = 1.66.


def test_runs_that_differ_by_their_seeds_alone_are_a_group(tmp_path):
    paths = [
        write_run(tmp_path / f"{name}{s}", {100: loss}, changed(rate=rate, seed=s))
        for s in (0, 1)
        for name, rate, loss in (("a", 1e-3, 4.0), ("b", 2e-3, 3.0))
    ]
    c = compare(paths)
    assert [(g.name, list(g.runs)) for g in c.groups] == [("a0", ["0", "1"]), ("b0", ["0", "1"])]
    assert c.results[1].difference is not None and c.results[1].difference.resolved
    assert "lower, with 2 of 2 seeds" in shown(c)
    twin = write_run(tmp_path / "twin", {100: 4.0}, changed(rate=1e-3, seed=1))
    with pytest.raises(ConfigError, match=r"a1 and .*twin are runs of one config and one seed"):
        compare([*paths, twin])


def test_a_variants_folder_and_one_run_of_it(tmp_path):
    root = write_sweep(tmp_path, {"base": [4.0, 5.0], "new": [3.0, 4.0]})
    c = compare([root / "base", root / "new" / "seed_1"])
    assert [g.name for g in c.groups] == ["base", "new"]
    assert c.results[1].seeds == ("1",)
    assert "one seed: its error is unknown" in shown(c)
    assert "new: unpaired seeds 0 are in no difference" in shown(c)


def test_a_run_that_diverged_is_shown_and_not_averaged_away(tmp_path):
    root = write_sweep(tmp_path, {"base": [4.0, 5.0], "wild": [1.0]})
    write_run(root / "wild/seed_1", {}, changed(rate=2e-3, seed=1), why="Diverged")
    c = compare([root])
    wild = c.results[1]
    assert "loss" not in wild.means and wild.difference is None and wild.diverged == 1
    assert difference_table(c).rows[0][-1] == "wild diverged (1 of 2)"
    assert seeds_table(c).rows[1][-1] == "diverged at step 20"
    assert "wild: no mean and no difference, for a run diverged" in shown(c)
    assert as_data(c)["groups"][1]["means"].get("loss") is None
    # Nor is anything said against a baseline that diverged.
    turned = compare([root], baseline="wild")
    assert turned.results[1].difference is None
    assert difference_table(turned).rows[0][-1] == "wild diverged (1 of 2)"


def test_a_loss_that_is_no_number_is_a_divergence(tmp_path):
    root = write_sweep(tmp_path, {"base": [4.0], "wild": [math.nan]})
    c = compare([root])
    assert c.results[1].diverged == 1


def test_unfinished_runs_count_only_after_a_step_that_is_asked_for(tmp_path):
    root = write_sweep(tmp_path, {"base": [4.0, 5.0], "new": [3.0]})
    write_run(root / "new/seed_1", {50: 4.5}, changed(rate=2e-3, seed=1), why="stopped")
    c = compare([root])
    assert c.results[1].counted == ("0",)
    assert "new: seed 1 stopped at step 50 of 100" in shown(c)
    early = compare([root], step=50)
    assert early.results[0].means["loss"] == 5.5 and early.results[1].means["loss"] == 4.25
    with pytest.raises(ConfigError, match=r"nothing to compare: .* --step=N"):
        compare([root / "new/seed_1"])
    with pytest.raises(ConfigError, match="no such evaluation"):
        compare([root / "base/seed_0"], step=60)


def test_losses_of_different_tokenizers_are_refused_and_bits_per_byte_are_not(tmp_path):
    a = write_run(tmp_path / "a", {100: 4.0}, tokenizer="{}")
    b = write_run(tmp_path / "b", {100: 3.0}, changed(rate=1), tokenizer="{ }")
    with pytest.raises(ConfigError, match=r"different tokenizers: .*--metric=bits_per_byte"):
        compare([a, b])
    c = compare([a, b], "bits_per_byte")
    assert c.results[1].difference is not None and c.results[1].difference.mean == -0.5
    assert "Different tokenizers" in shown(c)
    assert "loss" not in tables(c)[2].header  # nor beside it


def test_losses_on_different_held_out_text_are_refused(tmp_path):
    a = write_run(tmp_path / "a", {100: 4.0})
    other = write_run(tmp_path / "b", {100: 3.0}, changed(rate=1), text="b")
    with pytest.raises(ConfigError, match=r"different held-out text: d aaaaaaaa .* d bbbbbbbb"):
        compare([a, other])
    data = dataclasses.replace(BASE.data, validation_fraction=0.5)
    more = write_run(tmp_path / "c", {100: 3.0}, dataclasses.replace(BASE, data=data))
    with pytest.raises(ConfigError, match=r"0\.5 held out"):
        compare([a, more])


def test_what_must_be_known_is_said(tmp_path):
    a = write_run(tmp_path / "a", {100: 4.0})
    b = write_run(tmp_path / "b", {200: 3.0}, changed(steps=200), commit="decaf")
    text = shown(compare([a, b]))
    assert "Not at equal compute: the most costly group trains with 2 times the FLOPs" in text
    assert "different code or on different devices: c0ffee on 1 x cpu, decaf on 1 x cpu" in text
    many = {f"v{i}": [4.0, 5.0] for i in range(4)}
    assert "3 groups are compared with one baseline" in shown(
        compare([write_sweep(tmp_path / "s", many)])
    )


@pytest.mark.parametrize(
    "argv, text",
    [
        ([], "compare needs folders of runs"),
        (["{root}/no"], "no is no folder"),
        (["{root}"], "nor of a sweep"),
        (["{root}/a", "--baseline=x"], "--baseline=x is none of the groups a"),
        (["{root}/a", "--metric=los"], "no run has the metric 'los'; known: bits_per_byte, loss"),
        (["{root}/a", "--page={root}/no/x.html"], "there is no such folder"),
        (["{root}/a", "--plot={root}/no/x.png"], "does not exist"),
        (["{root}/a", "--plot={root}/x.doc"], ".doc is not one of"),
        (["{root}/a", "--format=xml"], "should be one of"),
    ],
)
def test_bad_input_is_named(tmp_path, argv, text):
    write_run(tmp_path / "a", {100: 4.0})
    with pytest.raises(ConfigError) as e:
        main([a.format(root=tmp_path) for a in argv])
    assert text in str(e.value)


def test_every_format(tmp_path, capsys):
    root = write_sweep(tmp_path, {"base": [4.0, 5.0], "new": [3.9, 4.8]})
    assert main([str(root), "--format=json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["groups"][1]["difference"]["mean"] == pytest.approx(-0.15)
    assert data["groups"][0]["runs"]["1"]["values"]["loss"] == 5.0
    main([str(root), "--format=csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["group"], r["seed"], float(r["loss"])) for r in rows][2:] == [
        ("new", "0", 3.9),
        ("new", "1", 4.8),
    ]
    main([str(root), "--format=markdown"])
    assert "| new | 2 | -0.1500 |" in capsys.readouterr().out
    assert len(run_table(compare([root])).rows) == 4


def test_the_page_is_whole_and_escapes(tmp_path, capsys):
    root = write_sweep(tmp_path / "s", {"base": [4.0, 5.0], "a<b>&c": [3.9, 4.8]})
    target = tmp_path / "x.html"
    assert main([str(root), "--baseline=base", f"--page={target}", "--format=csv"]) == 0
    text = target.read_text()
    assert text.count("<svg") == 6 and "a&lt;b&gt;&amp;c" in text and "a<b>" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing from elsewhere
    for svg in text.split("<svg")[1:]:
        ET.fromstring("<svg" + svg.split("</svg>")[0] + "</svg>")


def test_the_picture_shows_every_seed_and_what_is_sure(tmp_path, capsys):
    losses = {"base": [4.0, 5.0], "new": [3.9, 4.9], "same": [4.1, 4.8], "wild": [1.0]}
    root = write_sweep(tmp_path, losses)
    write_run(root / "wild/seed_1", {}, changed(rate=2e-3, seed=1), why="Diverged")
    c = compare([root])
    left, right = picture(c).axes
    assert [t.get_text() for t in left.get_yticklabels()] == ["wild", "same", "new", "base"]
    seeds = {int(line.get_ydata()[0]): line for line in left.lines if line.get_alpha() == 0.45}
    assert list(seeds[2].get_xdata()) == pytest.approx([-0.1, -0.1])
    assert list(seeds[1].get_xdata()) == pytest.approx([0.1, -0.2])
    # The first difference is that of both seeds, the second may be nothing, the third has no mean.
    assert seeds[2].get_color() != seeds[1].get_color() and 0 not in seeds
    assert any("1 of its runs diverged" in t.get_text() for t in left.texts)
    assert [bar.get_width() for bar in right.patches] == [1.0] * 4
    assert main([str(root), f"--plot={tmp_path / 'x.png'}", "--format=csv"]) == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_curves_are_means_over_seeds_against_every_axis(tmp_path):
    root = write_sweep(tmp_path, {"base": [4.0, 5.0]})
    (group,) = compare([root]).groups
    (line,) = lines(group, "validation", "loss", "steps")
    assert (line.x, line.y) == ([50, 100], [5.5, 4.5])
    assert (line.low, line.high) == ([5.0, 4.0], [6.0, 5.0])
    (line,) = lines(group, "validation", "loss", "tokens")
    assert line.x == [1000, 2000]
    (line,) = lines(group, "validation", "loss", "FLOPs")
    assert line.x == pytest.approx([n * model_flops_per_token(BASE) for n in (1000, 2000)])
    # 20 tokens a step at 200 a second; the first reading, a tenth of that, was compilation.
    (line,) = lines(group, "validation", "loss", "time of the steps")
    assert line.x == pytest.approx([5.0, 10.0])
    assert step_seconds(read_run(root / "base/seed_0"))[10] == pytest.approx(1.0)


def test_a_diverged_run_is_a_line_of_its_own(tmp_path):
    root = write_sweep(tmp_path, {"base": [4.0]})
    path = write_run(root / "base/seed_1", {10: 9.0}, changed(seed=1), why="Diverged")
    (group,) = compare([root, write_run(tmp_path / "x", {100: 3.0}, changed(rate=9))]).groups[:1]
    good, bad = lines(group, "validation", "loss", "steps")
    assert good.y == [5.0, 4.0] and not good.thin
    assert bad.y == [9.0] and bad.thin
    assert "base" in page(compare([root, tmp_path / "x"]))
    assert read_run(path).state == "diverged"


def test_of_many_groups_each_says_what_it_has_otherwise(tmp_path, capsys):
    """Ten columns of one config would be read by nobody."""
    root = write_sweep(tmp_path / "s", {f"g{i}": [2.0] for i in range(10)})
    assert main([str(root)]) == 0
    printed = capsys.readouterr().out
    assert "What differs from g0" in printed
    assert re.search(r"^g3 +optimizer\.learning_rate=0\.004$", printed, re.M)
    assert max(map(len, printed.splitlines())) <= 120


def test_experts_per_token_stand_beside_the_loss(tmp_path, capsys):
    """Routers that choose how many differ in what they cost; the mean of the last tenth is shown."""
    root = write_sweep(tmp_path / "s", {"a": [2.0], "b": [1.0]})
    path = root / "b" / "seed_0" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["kind"] == "train":
            row["experts_per_token"] = 2.5 if row["step"] > 90 else 9.0
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    main([str(root), "--format=csv"])
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["experts_per_token"] for row in found] == ["", "2.5"]
    main([str(root)])
    given = next(x for x in capsys.readouterr().out.split("\n\n") if "experts/token" in x)
    assert re.search(r"^b .* 2\.500$", given, re.M) and re.search(r"^a .* -$", given, re.M)

"""An analysis as tables to read: every figure beside what chance would give."""

from typing import Any

from moejax.text import Table

# What each figure is called, and in which order. `docs/analysis.md` defines them.
TITLES = {
    "max_vio": "MaxVio, all of the text",
    "max_vio_batch": "MaxVio, of a batch",
    "load_entropy": "entropy of the load / log E",
    "dead_experts": "dead experts",
    "cold_experts": "cold experts (under 10% of a fair share)",
    "domain_information": "route explained by the domain",
    "position_information": "route explained by the position",
    "token_information": "route explained by the token",
    "previous_information": "route explained by the token before's",
    "layer_information": "route explained by the layer before's",
    "token_specialisation": "a token's routes to its favourite expert",
    "predicted_specialisation": "the same of the predicted token",
    "co_activation_strength": "co-activation, distance from chance",
    "repetition": "experts that the token before had, too",
    "transition_concentration": "routes to the favourite next expert",
    "saturation": "experts already those of the last step",
    "score_entropy": "entropy of the scores / log E",
    "margin": "margin of what is ranked / mean score",
    "overruled": "tokens whose scores a bias overrules",
    "bf16_flips": "routes that flip if routers read bf16",
    "weight_similarity_mean": "cosine of two experts' weights",
    "output_similarity_mean": "cosine of two experts' outputs",
    "cka_mean": "linear CKA of two experts' outputs",
}
NOTE = (
    "Means over the MoE layers. [ ] holds the 95% interval of the figure, and of chance the middle 95%. "
    "A figure is beyond chance if it lies outside of that and its own interval leaves out chance's mean."
)


def tables(found: dict[str, Any], title: str) -> list[Table]:
    """The summary of an analysis; several steps have a row each."""
    several = len(found["steps"]) > 1
    body = []
    names = [*TITLES, *_balance(found)]
    by_name: dict[str, list[dict]] = {}
    for row in found["figures"]:
        if row["layer"] == -1 and not row["domain"]:
            by_name.setdefault(row["figure"], []).append(row)
    for name in names:
        for row in by_name.get(name, []):
            step = [str(row["step"])] if several else []
            body.append([TITLES.get(name, name.replace("_", " ")), *step, *cells(row)])
    head = ["figure", *(["step"] if several else []), "value", "chance", "beyond chance"]
    text = found["text"]
    size = f"{text['tokens']:,} tokens of {', '.join(found['domains'])}"
    step = "" if several else f", step {found['steps'][-1]}"
    out = [Table(f"{title}{step}: {size}", head, body, NOTE)]
    return [*out, _experts(found)]


def side_by_side(each: list[tuple[str, dict[str, Any]]]) -> Table:
    """Several analyses with their names, a column for each: of the newest step, with its interval."""
    columns = []
    for _, found in each:
        last = found["steps"][-1]
        rows = [r for r in found["figures"] if r["step"] == last and r["layer"] == -1]
        columns.append({r["figure"]: cells(r) for r in rows if not r["domain"]})
    body = []
    for figure, title in TITLES.items():
        if any(figure in c for c in columns):
            shown = [c.get(figure, ("-", "", "")) for c in columns]
            body.append([title, *(v + " *" * (sure == "yes") for v, _, sure in shown)])
    return Table(
        "Side by side",
        ["figure", *(name for name, _ in each)],
        body,
        "*: beyond chance. Each on its own text.",
    )


def cells(row: dict) -> tuple[str, str, str]:
    """(value and interval, chance and interval, whether it is beyond chance)."""
    sure = {True: "yes", False: "no", None: ""}[row["beyond_chance"]]
    return _with(row, "value", "low", "high"), _with(row, "null", "null_low", "null_high"), sure


def _with(row: dict, value: str, low: str, high: str) -> str:
    if row[value] is None:
        return "-"
    if row[low] is None:
        return number(row[value])
    return f"{number(row[value])} [{number(row[low])}, {number(row[high])}]"


def number(x: float) -> str:
    return f"{x:.3f}" if abs(x) >= 0.0995 or x == 0 else f"{x:.2g}"


def _balance(found: dict[str, Any]) -> list[str]:
    names = {r["figure"] for r in found["figures"]}
    return sorted(
        (n for n in names if n.endswith("_devices")), key=lambda n: (int(n.split("_")[1]), n)
    )


def _experts(found: dict[str, Any]) -> Table:
    """Super experts and how few experts hold half of the gate score."""
    median = found["median_greatest_output"]
    body = [
        [
            str(s["layer"]),
            str(s["expert"]),
            f"{s['greatest_output']:.3g}",
            f"{s['greatest_output'] / median:.1f}",
        ]
        for s in found["super_experts"][:8]
    ]
    half = [len(chosen) for chosen in found["selected"]["esft_gate"]["0.5"]]
    note = (
        f"Half of the gate score is held by {min(half)} to {max(half)} of {found['experts']} experts in "
        f"a layer (evenly: {-(-found['experts'] // 2)})."
    )
    head = ["MoE layer", "expert", "greatest output", "over the median"]
    return Table("Greatest outputs of the down projection (super experts)", head, body, note)

"""Writes one self-contained HTML page of pictures about a run."""

import base64
import dataclasses
import pathlib
from typing import NamedTuple

import jinja2
import markupsafe
import numpy as np

from moejax import user_cache
from moejax.config import ConfigError, ExperimentConfig
from moejax.config_io import to_json
from moejax.cost.architecture import active, of_model, total
from moejax.data import load_corpus, validation_batches
from moejax.evals import charts
from moejax.evals.analysis import run as analysis
from moejax.evals.analysis.information import favourites, information
from moejax.evals.analysis.pictures import pictures
from moejax.evals.analysis.text import tables
from moejax.evals.generate import generate
from moejax.evals.token_counts import count_tokens
from moejax.evals.validation import size_text
from moejax.moe.stats import size_below
from moejax.runs import folder, provenance
from moejax.runs.metrics import read_metrics
from moejax.runs.open import OpenRun, load_run, read_config
from moejax.text import count_text

ROUTED_BATCHES = 8  # held-out batches whose routes are counted
PROMPT_TOKENS, SAMPLE_TOKENS = 24, 120


class Sample(NamedTuple):
    """The beginning of a held-out document, and the model's continuation."""

    prompt: str
    text: str


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of the page; empty fields are left out."""

    title: str
    text: str
    images: tuple[str, ...] = ()
    svgs: tuple[markupsafe.Markup, ...] = ()
    table: tuple = ()
    experts: tuple = ()
    samples: tuple[Sample, ...] = ()


def write_report(
    workdir: pathlib.Path, step: int | None = None
) -> tuple[pathlib.Path, tuple[Sample, ...]]:
    """Write the report of a run into its folder; return its path and the samples in it.

    Reads the log and the checkpoint of `step` (None: the newest), runs the model over held-out text, and draws
    its analysis if `moejax analyze` wrote one. Of an imported model that is all there is. Raises ConfigError if
    the folder is neither that of a trained run nor analysed, or has no such checkpoint.
    """
    analysed = analysis.read(workdir)
    analysis_sections = [] if analysed is None else sections_of(*analysed)
    if folder.steps(workdir) and not folder.is_trained(workdir):  # no log, no text of its own
        if analysed is None:
            raise ConfigError(
                f"{workdir} is an imported model, which has no log of training; after moejax analyze "
                f"--workdir={workdir} --sources=a=FILES,b=FILES there is something to draw"
            )
        return _written(workdir, page(read_config(workdir), None, analysis_sections)), ()
    rows = read_metrics(workdir)
    run = load_run(workdir, step=step)
    corpus = load_corpus(run.cfg.data, cache=user_cache.place("text"))
    sections = [loss_section(rows), validation_table(rows)]
    if run.cfg.model.num_moe_layers and "routing" in rows:
        sections += [
            load_section(rows),
            balance_section(rows),
            *([router_section(rows)] if "router" in rows else []),
            *routing_sections(rows, run, corpus),
        ]
    sections += analysis_sections
    samples = samples_section(run, corpus)
    sections += [samples, optimisation_section(rows), provenance_section(workdir)]
    return _written(workdir, page(run.cfg, rows, sections)), samples.samples


def _written(workdir: pathlib.Path, text: str) -> pathlib.Path:
    path = workdir / folder.REPORT
    path.write_text(text, "utf-8")
    return path


def sections_of(found: dict, table) -> list[Section]:
    """Of an analysis: its pictures, its table, and what the experts read."""
    out = [
        Section(p.title, p.text, svgs=tuple(map(markupsafe.Markup, p.svgs)))
        for p in pictures(found, table)
    ]
    summary, _ = tables(found, "Analysis")
    rows = tuple((*row,) for row in (summary.header, *summary.rows))
    return [*out, Section(summary.title, summary.note, table=rows)]


def few_layers(num_layers: int, most: int = 6) -> list[int]:
    """At most `most` layers, evenly spread from the first to the last."""
    return sorted({round(i) for i in np.linspace(0, num_layers - 1, min(most, num_layers))})


def _series(rows: dict[int, dict], name: str) -> tuple[list[int], list[float]]:
    steps = [s for s, r in rows.items() if name in r]
    return steps, [rows[s][name] for s in steps]


def _names(rows: dict[int, dict], prefix: str) -> list[str]:
    return sorted({k for r in rows.values() for k in r if k.startswith(prefix)})


def _image(data: bytes) -> str:
    return base64.b64encode(data).decode()


def loss_section(rows) -> Section:
    train, held_out = rows["train"], rows["validation"]
    by_domain = {n.removeprefix("loss/"): _series(held_out, n) for n in _names(held_out, "loss/")}
    panels = [
        (
            "Cross-entropy",
            "nats per token",
            {
                "training batch": _series(train, "cross_entropy"),
                "held-out text": _series(held_out, "loss"),
            },
        ),
        ("Held-out text, by domain", "nats per token", by_domain),
    ]
    text = "How well the model predicts the next token; lower is better."
    return Section("Loss", text, (_image(charts.lines(panels)),))


def validation_table(rows) -> Section:
    step, last = list(rows["validation"].items())[-1]
    head = ("domain", "loss (nats per token)", "perplexity")
    body = [("all", last["loss"])]
    body += [(n.removeprefix("loss/"), last[n]) for n in _names({step: last}, "loss/")]
    table = [head] + [(n, f"{v:.4f}", f"{np.exp(v):.1f}") for n, v in body]
    size = size_text(last)
    text = (
        f"Held-out documents at step {step}{size and f' ({size})'}: {last['bits_per_byte']:.3f} bits per byte "
        "of text."
    )
    return Section("Validation", text, table=tuple(table))


def load_section(rows) -> Section:
    loads = rows["load"]
    load_sLE = np.array([r["load_LE"] for r in loads.values()])
    image = charts.load_over_time(list(loads), load_sLE, few_layers(load_sLE.shape[1]))
    text = (
        "Each row is an expert, each column a step. 1 is its fair share of the tokens; dark rows get "
        "too few tokens, bright rows too many."
    )
    return Section("Load of every expert over time", text, (_image(image),))


def balance_section(rows) -> Section:
    train = rows["train"]
    panels = [
        ("MaxVio (0 = balanced)", "max load / mean - 1", {"": _series(train, "max_vio")}),
        ("Entropy of the load", "fraction of log E", {"": _series(train, "load_entropy")}),
        ("Experts without a token", "mean over layers", {"": _series(train, "dead_experts")}),
    ]
    if any(_series(train, "drop_fraction")[1]):
        panels.append(("Routes dropped", "fraction", {"": _series(train, "drop_fraction")}))
    text = "Averaged over the MoE layers, for one training batch. MaxVio: 2408.15664, section 4.1."
    return Section("Balance", text, (_image(charts.lines(panels)),))


def router_section(rows) -> Section:
    """The counts that the router itself keeps, and the state that its rule changes, over time."""
    steps = list(rows["router"])
    panels, images = [], []
    for name in sorted(next(iter(rows["router"].values())).keys() - {"step", "kind"}):
        value_sL = np.array([r[name] for r in rows["router"].values()])
        layers = few_layers(value_sL.shape[1])
        if not value_sL.any():
            continue  # nothing was dropped, say
        if value_sL.ndim == 2:
            each = {f"layer {i}": (steps, value_sL[:, i].tolist()) for i in layers}
            panels.append((name, "sum over tokens" if name.startswith("stats") else "", each))
        else:
            images.append(_image(charts.values_over_time(name, steps, value_sL, layers)))
    images += [_image(charts.lines(panels[i : i + 3])) for i in range(0, len(panels), 3)]
    text = "The router's state, which its rule updates (`state/`), and its counts over one batch (`stats/`)."
    return Section("The router's own state and counts", text, images=tuple(images))


def routing_sections(rows, run: OpenRun, corpus) -> list[Section]:
    """Which domains and which tokens the experts specialise in, on held-out text."""
    last = list(rows["routing"].values())[-1]
    load_dLE, domains = np.array(last["load_dLE"]), last["domains"]
    layers = few_layers(load_dLE.shape[1])
    data = run.cfg.data
    batches = validation_batches(corpus, run.tokenizer, data, ROUTED_BATCHES * data.batch_size)
    token_EV = count_tokens(run.params, run.router_state, run.cfg, batches, layers)
    return [
        domain_section(load_dLE, domains, layers),
        information_section(rows["routing"], layers),
        *logit_sections(rows["routing"], layers),
        expert_section(load_dLE, domains, token_EV, run),
    ]


def domain_section(load_dLE: np.ndarray, domains: list[str], layers: list[int]) -> Section:
    text = (
        "Each expert's share of a domain's held-out tokens; 1 is the uniform share. "
        "Experts are sorted by the domain that they favour."
    )
    image = charts.domains_to_experts(load_dLE, domains, layers)
    return Section("Which domain goes to which expert", text, (_image(image),))


def information_section(routing: dict[int, dict], layers: list[int]) -> Section:
    told_sL = [information(np.array(r["load_dLE"]).transpose(1, 2, 0)) for r in routing.values()]
    series = {
        f"MoE layer {layer}": (list(routing), [told_L[layer] for told_L in told_sL])
        for layer in layers
    }
    text = (
        "Mutual information of domain and expert over the entropy of the domain, on held-out text: "
        "0 if all domains use the experts alike, 1 if a single route gives the domain away."
    )
    image = charts.lines([("", "I(domain; expert) / H(domain)", series)])
    return Section("How much a route reveals about the domain", text, (_image(image),))


def logit_sections(routing: dict[int, dict], layers: list[int]) -> list[Section]:
    """How large the router's logits are; nothing if it has none, or the run was older than they are counted."""
    rows = {step: row for step, row in routing.items() if "logits_LN" in row}
    if not rows:
        return []

    def size(row, layer):
        edges = row["logit_edges"]
        return min(size_below(row["logits_LN"][layer], edges, 0.99), 2 * edges[-1])

    series = {
        f"MoE layer {layer}": (list(rows), [size(row, layer) for row in rows.values()])
        for layer in layers
    }
    text = (
        "99% of the router's logits on held-out text are no larger than this, whatever their sign (rounded up "
        "to half a power of 2). Where they grow on and on, objective.z_loss keeps them small."
    )
    image = charts.lines([("", "size of logits", series)])
    return [Section("How large router logits are", text, (_image(image),))]


def expert_section(load_dLE, domains, token_EV, run: OpenRun, most: int = 4) -> Section:
    """The most specialised experts of each layer, with their favourite tokens."""
    found = []
    for layer, counts in token_EV.items():
        load_dE = load_dLE[:, layer]
        share_dE = load_dE / np.maximum(load_dE.sum(axis=1, keepdims=True), 1)
        partial_E = share_dE.max(axis=0) / np.maximum(share_dE.mean(axis=0), 1e-9)
        # An expert with very few tokens favours a domain by chance.
        partial_E[load_dE.sum(axis=0) < 0.2 * load_dE.sum() / load_dE.shape[1]] = 0
        chosen = [int(e) for e in np.argsort(-partial_E)[:most] if partial_E[e] > 0]
        for expert in sorted(chosen):
            tokens = [
                run.tokenizer.pieces[t].decode("utf-8", "replace").replace("\n", "⏎")
                for t in favourites(counts.T, expert, 12)
            ]
            domain = domains[int(share_dE[:, expert].argmax())]
            found.append(dict(layer=layer, expert=expert, domain=domain, tokens=tokens))
    text = (
        f"In each layer, the {most} experts that favour one domain most, on held-out text at step "
        f"{run.step}."
    )
    return Section("What experts read", text, experts=tuple(found))


def samples_section(run: OpenRun, corpus) -> Section:
    """For each domain, continue the beginning of one held-out document. Empty if the router is not causal."""
    if run.cfg.model.router is not None and not run.cfg.model.router.causal:
        router = run.cfg.model.moe.router.name
        return Section(
            "Samples", f"The router {router!r} is not causal: the model cannot generate."
        )
    prompts = [
        [run.tokenizer.bos_id, *run.tokenizer.encode(documents[0].text[:400])[:PROMPT_TOKENS]]
        for documents in corpus.validation.values()
    ]
    texts = continue_prompts(run, prompts, SAMPLE_TOKENS)
    samples = [Sample(run.tokenizer.decode(p[1:]), text) for p, text in zip(prompts, texts)]
    text = (
        f"Beginnings of held-out documents (blue), and how the model of step {run.step} goes on "
        "(temperature 0.8, top-p 0.95)."
    )
    return Section("Samples", text, samples=tuple(samples))


def continue_prompts(run: OpenRun, prompts: list[list[int]], max_new: int) -> list[str]:
    """Continue each prompt, until the model ends the document."""
    max_new = min(max_new, run.cfg.model.max_seq_len - max(map(len, prompts)))
    eos = run.tokenizer.eos_id
    rows = generate(
        run.params,
        run.router_state,
        run.cfg.model,
        prompts,
        max_new,
        compute=run.cfg.compute,
        temperature=0.8,
        top_p=0.95,
        stop_ids=(eos,),
    )
    return [run.tokenizer.decode(i for i in row if i != eos) for row in rows]


def optimisation_section(rows) -> Section:
    train = rows["train"]
    panels = [
        ("Learning rate", "", {"": _series(train, "learning_rate")}),
        ("Gradient norm, before clipping", "", {"": _series(train, "grad_norm")}),
        ("Speed", "tokens per second", {"": _series(train, "tokens_per_second")}),
    ]
    text = "The optimiser's schedule, the size of its gradients, and the speed of the run."
    return Section("Optimisation", text, (_image(charts.lines(panels)),))


def provenance_section(workdir: pathlib.Path) -> Section:
    """Which code computed the run, on what and when; one row for each time that it was started."""
    table = provenance.table(workdir)
    if table is None:
        return Section("Where it comes from", "Unknown: the run has no record of it.")
    text = "Each part of the run, from its start or resumption to its end."
    if began := provenance.origin(workdir):
        text = f"It began from {began}. {text}"
    rows = tuple((*row,) for row in (table.header, *table.rows))
    return Section("Where it comes from", text, table=rows)


def page(cfg: ExperimentConfig, rows: dict | None, sections: list[Section]) -> str:
    """The whole page; `rows` is the log, None for an imported model. Everything that comes from data is
    escaped."""
    arch, step = of_model(cfg.model), 0
    cards = [
        (count_text(total(arch)), "parameters"),
        (count_text(active(arch)), "active per token"),
    ]
    if rows is not None:
        step, last_train = list(rows["train"].items())[-1]
        held_out = list(rows["validation"].values())[-1]
        size = size_text(held_out)
        tokens = step * cfg.data.batch_size * cfg.data.seq_len
        speed = np.median(_series(rows["train"], "tokens_per_second")[1])
        cards = [
            (f"{held_out['loss']:.3f}", f"validation loss{size and f', {size}'}"),
            (f"{held_out['bits_per_byte']:.3f}", "bits per byte"),
            *cards,
            (count_text(tokens), "training tokens"),
            (f"{speed:,.0f}", "tokens per second"),
            (f"{int(last_train['skipped'])}", "skipped steps"),
        ]
    m = cfg.model
    kind = (
        f"{m.moe.num_experts} routed experts, {m.moe.experts_per_token} per token, "
        f"{m.moe.shared_experts} shared; {m.num_moe_layers} MoE layers of {m.num_layers}"
        if m.num_moe_layers
        else f"dense, {m.num_layers} layers"
    )
    here = pathlib.Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html").render(
        name=cfg.name,
        subtitle=f"{kind}. Width {m.d_model}, sequences of {cfg.data.seq_len} tokens, step {step}.",
        cards=cards,
        sections=sections,
        config=to_json(cfg),
    )

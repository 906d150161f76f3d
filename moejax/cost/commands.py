"""`moejax plan` and `moejax compare`: flags in, tables out."""

import dataclasses
import pathlib
import sys

from absl import flags
from ml_collections import config_flags

from moejax.config import (
    CHOICES,
    ConfigError,
    ExperimentConfig,
    ModelConfig,
    choice_problem,
    from_config_dict,
)
from moejax.cost import compare as comparing
from moejax.cost.hardware import load_device
from moejax.cost.memory import MeshSizes, checkpoint_bytes
from moejax.cost.plan import Run, of_experiment, plan
from moejax.cost.published import facts_of, published, sizes_text
from moejax.cost.roofline import EFFICIENCY
from moejax.cost.tables import FORMATS, bytes_text, render
from moejax.models import zoo


def _parse(name: str, usage: str, fv: flags.FlagValues, argv: list[str]) -> list[str] | None:
    """Positional arguments; None after --help. A bad flag becomes a ConfigError with the usage."""
    if any(a in ("--help", "-h", "-help") for a in argv):
        print(f"{usage}\n\nFlags:\n{fv.get_help()}")
        return None
    try:
        return fv([name, *argv])[1:]
    # ml_collections reports a bad override by these.
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        raise ConfigError(f"{e}\n{usage}") from e


PLAN_USAGE = """\
usage: moejax plan MODEL                       a published model by name, e.g. deepseek-moe-16b
       moejax plan --hf_config=DIR             a Hugging Face config.json, or its directory
       moejax plan --config=experiments/x.py   an experiment; --config.model...= overrides work"""


def _plan_flags(argv: list[str]) -> flags.FlagValues:
    fv = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Experiment to plan.", flag_values=fv, sys_argv=["plan", *argv]
    )
    text, whole, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("model", None, "Name of a published model.", flag_values=fv)
    text("hf_config", None, "A Hugging Face config.json, or its directory.", flag_values=fv)
    text("device", "h100", "A device of the table, or 'cpu' (measured).", flag_values=fv)
    text("mesh", None, "Devices per axis: data=1,fsdp=8,expert=4,tensor=1.", flag_values=fv)
    whole("devices", 1, "Devices of an experiment whose mesh has a -1.", flag_values=fv)
    whole("batch", None, "Sequences per step, or served at once.", flag_values=fv)
    whole("micro_batch", None, "Sequences per forward and backward pass.", flag_values=fv)
    whole("context", None, "Tokens per sequence [4096, or the maximum].", flag_values=fv)
    real("tokens", None, "Training budget in tokens, e.g. 2e12.", flag_values=fv)
    real("price", None, "USD per device and hour.", flag_values=fv)
    real("efficiency", EFFICIENCY, "Part of the peak FLOP/s reached.", flag_values=fv)
    text("dtype", None, "Compute dtype [bfloat16].", flag_values=fv)
    text("remat", None, "Rematerialisation in training [full].", flag_values=fv)
    flags.DEFINE_enum("format", "table", FORMATS, "How to print.", flag_values=fv)
    flags.DEFINE_boolean(
        "verify", False, "Compile and run the real step, and compare.", flag_values=fv
    )
    return fv


def plan_main(argv: list[str]) -> int:
    """`moejax plan ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = _plan_flags(argv)
    names = _parse("plan", PLAN_USAGE, fv, argv)
    if names is None:
        return 0
    wanted = [*names, *([fv.model] if fv.model else [])]
    given = len(wanted) + bool(fv.hf_config) + (fv.config is not None)
    if given != 1:
        raise ConfigError(f"plan takes one model, not {given}\n{PLAN_USAGE}")
    device = load_device(fv.device, fv.price)
    if fv.config is not None:
        experiment = _experiment(fv.config)
        arch, run = of_experiment(experiment, device, fv.devices)
        cfg: ModelConfig | None = experiment.model
        note = ""
    else:
        experiment = ExperimentConfig()
        arch, cfg, note = _load(wanted[0] if wanted else None, fv.hf_config)
        run = Run(device, context=min(4096, arch.max_seq_len))
    run = _override(run, fv, arch.max_seq_len)
    if cfg is not None:
        cfg = _computed(cfg, fv, published=fv.config is None)
    print(render(plan(arch, cfg, run, note), fv.format))
    if fv.verify:
        if fv.config is None:
            raise ConfigError(
                "--verify runs the real training step: it needs --config=experiments/x.py"
            )
        from moejax.cost.verify import verify

        print(render(verify(experiment), fv.format))
    return 0


def _experiment(config) -> ExperimentConfig:
    """The frozen config; a file that ml_collections could not load is reported when first used."""
    try:
        return from_config_dict(config)
    except OSError as e:
        raise ConfigError(f"--config: {e}") from e


def _load(name: str | None, hf_config: str | None):
    """(architecture, ModelConfig or None if it cannot run, what was published)."""
    if hf_config:
        arch, hf = comparing.load_file(pathlib.Path(hf_config))
        runnable = hf.get("model_type") in zoo.FAMILIES
        return arch, zoo.config_from_hf(hf) if runnable else None, _released(arch, hf)
    assert name is not None
    arch = comparing.load_architecture(name)
    if arch is None:
        source = published()[name]["source"]
        raise ConfigError(f"{name} is undisclosed: there is nothing to compute from ({source})")
    if name not in zoo.PRESETS and name not in zoo.COUNTED_PRESETS:
        return _load(None, name)
    facts = facts_of(name)
    convention = facts.get("convention", "with embeddings")
    stated = f"Published: {sizes_text(facts)}, active counted {convention} ({facts.get('source')})."
    cfg = zoo.load_preset(name) if name in zoo.PRESETS else None
    notes = [stated if facts else "", _released(arch, zoo.load_hf(name))]
    return arch, cfg, " ".join(filter(None, notes))


def _released(arch, hf: dict) -> str:
    """The size of a quantised release; empty where it is BF16, as the tables below assume, or where
    parts of it are not counted."""
    if "quantization_config" not in hf or arch.missing:
        return ""
    method = hf["quantization_config"].get("quant_method")
    return f"Released in {method}: {bytes_text(checkpoint_bytes(arch, hf))}."


def _override(run: Run, fv, max_seq_len: int) -> Run:
    """The run with what the flags say in place of its defaults."""
    changes = {"efficiency": fv.efficiency}
    for key in ("batch", "context", "tokens"):
        if fv[key].value is not None:
            changes[key] = fv[key].value
    if fv.mesh is not None:
        changes["mesh"] = parse_mesh(fv.mesh)
    run = dataclasses.replace(run, **changes)
    if run.context > max_seq_len:
        raise ConfigError(f"context={run.context} is beyond the model's maximum of {max_seq_len}")
    if fv.batch is None and fv.config is None:
        run = dataclasses.replace(run, batch=run.mesh.batch)
    micro = fv.micro_batch or (run.micro_batch if fv.config is not None else run.batch)
    return dataclasses.replace(run, micro_batch=min(micro, run.batch))


def _computed(cfg: ModelConfig, fv, published: bool) -> ModelConfig:
    """How it is computed: published models in bfloat16 with full remat, unless a flag says else."""
    defaults = {"dtype": "bfloat16", "remat": "full"} if published else {}
    for key in ("dtype", "remat"):
        value = fv[key].value or defaults.get(key)
        if value is None:
            continue
        problem = choice_problem(key, value, CHOICES[key])
        if problem:
            raise ConfigError(problem)
        cfg = dataclasses.replace(cfg, **{key: value})
    return cfg


def parse_mesh(text: str) -> MeshSizes:
    """'fsdp=8,expert=4' -> MeshSizes; ConfigError names a bad axis or size."""
    known = [f.name for f in dataclasses.fields(MeshSizes)]
    sizes = {}
    for item in filter(None, text.split(",")):
        axis, _, size = item.partition("=")
        if axis not in known or not size.isdigit() or int(size) < 1:
            raise ConfigError(
                f"--mesh: {item!r} is not axis=size with axis one of {', '.join(known)} and size "
                "at least 1; 'fsdp=8,expert=4' would work"
            )
        sizes[axis] = int(size)
    return MeshSizes(**sizes)


COMPARE_USAGE = """\
usage: moejax compare MODEL MODEL ... [--baseline=MODEL] [--format=table|markdown|csv]
[--plot=X.png]"""


def compare_main(argv: list[str]) -> int:
    """`moejax compare ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    flags.DEFINE_string("baseline", "", "Model FLOPs are relative to [the first].", flag_values=fv)
    flags.DEFINE_integer("context", 4096, "Tokens per sequence.", flag_values=fv)
    flags.DEFINE_enum("format", "table", FORMATS, "How to print.", flag_values=fv)
    flags.DEFINE_string("plot", None, "Write a picture to this file.", flag_values=fv)
    models = _parse("compare", COMPARE_USAGE, fv, argv)
    if models is None:
        return 0
    rows = comparing.compare(models, fv.baseline, fv.context)
    baseline = fv.baseline or models[0]
    tables = {
        "table": lambda: comparing.text_tables(rows, baseline, fv.context),
        "markdown": lambda: [comparing.wide_table(rows, baseline, fv.context)],
        "csv": lambda: [comparing.csv_table(rows)],
    }[fv.format]()
    print(render(tables, fv.format), end="")
    if fv.plot:
        from moejax.cost.plot import plot

        plot(rows, fv.plot, fv.context)
        print(f"wrote {fv.plot}", file=sys.stderr)
    return 0

"""`moejax plan`: what a model costs, before it runs."""

import dataclasses
import pathlib

from absl import flags

from moejax.axes import BATCH
from moejax.commands.flags import define_config, experiment_of, parse
from moejax.config import ComputeConfig, ConfigError, ExperimentConfig
from moejax.cost.hardware import load_device
from moejax.cost.memory import checkpoint_bytes
from moejax.cost.models import load_architecture, load_file
from moejax.cost.plan import plan
from moejax.cost.published import facts_of, published, sizes_text
from moejax.cost.roofline import EFFICIENCY
from moejax.cost.setup import Setup, of_experiment
from moejax.data.vocabulary import expected_tokens, with_vocabulary
from moejax.mesh import parse_mesh
from moejax.models import zoo
from moejax.options import choice_problem, choices_of
from moejax.text import FORMATS, bytes_text, render

USAGE = """\
usage: moejax plan MODEL                       a published model by name, e.g. deepseek-moe-16b
       moejax plan --hf_config=DIR             a Hugging Face config.json, or its directory
       moejax plan --config=experiments/x.py   an experiment; --config.model...= overrides work
       moejax plan --workdir=RUN               a run, trained or imported
   e.g. moejax plan deepseek-v3 --device=h800 --mesh=fsdp=64,expert=8 --batch=15360 --tokens=14.8e12"""


def _flags(argv: list[str]) -> flags.FlagValues:
    fv = flags.FlagValues()
    define_config(fv, "Experiment to plan.")
    text, whole, real = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
    text("model", None, "Name of a published model.", flag_values=fv)
    text("workdir", None, "Folder of a run.", flag_values=fv)
    text("hf_config", None, "A Hugging Face config.json, or its directory.", flag_values=fv)
    text("device", "h100", "A device of the table, or 'cpu' (measured).", flag_values=fv)
    text(
        "mesh",
        None,
        "Devices per axis, e.g. data=1,fsdp=8,expert=4,tensor=1 [one device].",
        flag_values=fv,
    )
    whole("devices", 1, "Number of devices, for an experiment whose mesh has a -1.", flag_values=fv)
    whole("batch", None, "Sequences per step of training, or served at once.", flag_values=fv)
    whole("micro_batch", None, "Sequences per forward and backward pass.", flag_values=fv)
    whole("context", None, "Tokens per sequence [4096, or the maximum].", flag_values=fv)
    real("tokens", None, "Training budget in tokens, e.g. 2e12.", flag_values=fv)
    real("price", None, "USD per device and hour [the table's, if any].", flag_values=fv)
    real(
        "efficiency",
        EFFICIENCY,
        "Fraction of the peak FLOP/s that training reaches.",
        flag_values=fv,
    )
    text("dtype", None, "Compute dtype of training [bfloat16].", flag_values=fv)
    text("remat", None, "Rematerialisation in training: none, dots or [full].", flag_values=fv)
    flags.DEFINE_enum(
        "format", "table", FORMATS, "For people, or with exact numbers.", flag_values=fv
    )
    flags.DEFINE_boolean(
        "verify", False, "Compile and run the real step, and compare.", flag_values=fv
    )
    return fv


def main(argv: list[str]) -> int:
    """`moejax plan ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = _flags(argv)
    names = parse("plan", USAGE, fv, argv)
    if names is None:
        return 0
    wanted = [*names, *([fv.model] if fv.model else [])]
    ours = fv.config is not None or bool(fv.workdir)
    given = len(wanted) + bool(fv.hf_config) + bool(fv.workdir) + (fv.config is not None)
    if given != 1:
        raise ConfigError(f"plan takes one model, not {given}\n{USAGE}")
    device = load_device(fv.device, fv.price)
    if ours:
        experiment = _experiment(fv, argv)
        arch, setup = of_experiment(experiment, device, fv.devices)
        cfg: ExperimentConfig | None = experiment
        note = ""
    else:
        experiment = ExperimentConfig()
        arch, cfg, note = _load(wanted[0] if wanted else None, fv.hf_config)
        setup = Setup(device, context=min(4096, arch.max_seq_len))
    setup = _override(setup, fv, arch.max_seq_len)
    cfg = _computed(cfg, fv, published=not ours)
    print(render(plan(arch, cfg, setup, note), fv.format))
    if fv.verify:
        if not ours:
            raise ConfigError(
                "--verify runs the real training step: it needs --config=experiments/x.py or --workdir=RUN"
            )
        from moejax.train.verify import verify

        print(render(verify(experiment), fv.format))
    return 0


def _experiment(fv, argv: list[str]) -> ExperimentConfig:
    """That of --config or of the run in --workdir."""
    if fv.workdir:
        from moejax.runs.open import read_config

        return read_config(pathlib.Path(fv.workdir))
    experiment = experiment_of(fv, argv)
    return with_vocabulary(experiment, expected_tokens(experiment.data))


def _load(name: str | None, hf_config: str | None):
    """(architecture, experiment or None if it cannot run, what was published)."""
    if hf_config:
        arch, hf = load_file(pathlib.Path(hf_config))
        runnable = hf.get("model_type") in zoo.FAMILIES
        cfg = None
        if runnable:
            model, objective = zoo.config_from_hf(hf), zoo.objective_from_hf(hf)
            cfg = ExperimentConfig(model=model, objective=objective)
        return arch, cfg, _released(arch, hf)
    assert name is not None
    arch = load_architecture(name)
    if arch is None:
        source = published()[name]["source"]
        raise ConfigError(f"{name} is undisclosed: there is nothing to compute from ({source})")
    if name not in zoo.PRESETS and name not in zoo.COUNTED_PRESETS:
        return _load(None, name)
    facts = facts_of(name)
    convention = facts.get("convention", "with embeddings")
    stated = f"Published: {sizes_text(facts)}, active counted {convention} ({facts.get('source')})."
    cfg = None
    if name in zoo.PRESETS:
        model, objective = zoo.load_preset(name), zoo.load_objective(name)
        cfg = ExperimentConfig(model=model, objective=objective)
    notes = [stated if facts else "", _released(arch, zoo.load_hf(name))]
    return arch, cfg, " ".join(filter(None, notes))


def _released(arch, hf: dict) -> str:
    """The size of a quantised release. Empty if the release is BF16, which the tables assume anyway, or if
    some of it is not counted."""
    if "quantization_config" not in hf or arch.missing:
        return ""
    method = hf["quantization_config"].get("quant_method")
    return f"Released in {method}: {bytes_text(checkpoint_bytes(arch, hf))}."


def _override(setup: Setup, fv, max_seq_len: int) -> Setup:
    """The setup, with its defaults replaced by the flags."""
    changes = {"efficiency": fv.efficiency}
    for key in ("batch", "context", "tokens"):
        if fv[key].value is not None:
            changes[key] = fv[key].value
    if fv.mesh is not None:
        changes["mesh"] = parse_mesh(fv.mesh)
    setup = dataclasses.replace(setup, **changes)
    if setup.context > max_seq_len:
        raise ConfigError(f"context={setup.context} is beyond the model's maximum of {max_seq_len}")
    if fv.batch is None and fv.config is None:
        setup = dataclasses.replace(setup, batch=setup.mesh.size(BATCH))
    micro = fv.micro_batch
    if micro is None:
        micro = min(setup.micro_batch, setup.batch) if fv.config is not None else setup.batch
    return dataclasses.replace(setup, micro_batch=micro)


def _computed(cfg: ExperimentConfig | None, fv, published: bool) -> ExperimentConfig | None:
    """How it is computed: published models in bfloat16 with full remat, unless a flag says otherwise."""
    changes = {"dtype": "bfloat16", "remat": "full"} if published else {}
    for key in ("dtype", "remat"):
        value = fv[key].value
        if value is None:
            continue
        problem = choice_problem("--" + key, value, choices_of(ComputeConfig, key))
        if problem is None and cfg is None:
            problem = f"--{key} is for training, and this model can only be counted"
        if problem:
            raise ConfigError(problem)
        changes[key] = value
    if cfg is None:
        return None
    return dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, **changes))

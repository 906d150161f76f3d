"""Between a Hugging Face folder and the folder of a run, both ways."""

import dataclasses
import math
import pathlib
from collections.abc import Collection

import jax
import jax.numpy as jnp

from moejax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
)
from moejax.data.tokenizer import FILE_NAME, JsonTokenizer
from moejax.data.tokenizer_check import check_tokenizer
from moejax.interop.files import (
    InteropError,
    exists,
    need_space,
    parse_json,
    read_bytes,
    read_text,
    whole_folder,
)
from moejax.interop.hf_folder import CONFIG, open_folder
from moejax.interop.load import read_model
from moejax.interop.own_files import as_json, own_files, token_ids
from moejax.interop.prompts import FILES, GENERATION_CONFIG, check_tokens, read_prompt_files
from moejax.interop.save import write_folder
from moejax.mesh import RULES
from moejax.models.zoo import (
    FAMILIES,
    config_from_hf,
    config_to_hf,
    lost_fields,
    objective_from_hf,
)
from moejax.models.zoo.architecture import architecture
from moejax.params import count
from moejax.runs import folder as run_folder
from moejax.runs.checkpoint import Checkpoints
from moejax.runs.open import load_run
from moejax.sharding import Layout, make_mesh

# Files of a checkpoint that a run keeps in folder.HF, so that `export` can write them again and
# `generate` can read what it needs.
KEPT = (*FILES, "vocab.json", "merges.txt")


def import_run(
    hf_dir: pathlib.Path, workdir: pathlib.Path, ignore_keys: Collection[str] = ()
) -> None:
    """Make `workdir` a run: config.json, tokenizer.json, hf/, and a checkpoint of step 0.

    The files are read, and kept, without `ignore_keys`.

    It appears whole, when everything is written, or not at all. Nothing outside of it and of a
    temporary folder beside it is written.

    Raises:
      ConfigError: see `load_model`; no tokenizer.json, or one that does not fit; workdir is taken.
    """
    opened = open_folder(hf_dir, ignore_keys)
    objective = objective_from_hf(opened.hf)
    text = _tokenizer_text(hf_dir)
    check_tokenizer(text, str(hf_dir / FILE_NAME))
    tokenizer = JsonTokenizer(text, str(hf_dir / FILE_NAME))
    files = read_prompt_files(hf_dir, ignore_keys)
    if not {"added_tokens_decoder", "added_tokens"} & set(ignore_keys):
        check_tokens(files, tokenizer)
    kept = {name: _kept(hf_dir, name, ignore_keys) for name in KEPT if exists(hf_dir, name)}
    with whole_folder(workdir) as folder:
        tensors = opened.tensors.values()
        need_space(folder, sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors))
        model = read_model(opened, layout=_host(), progress=True)
        cfg, params, router_state, account = model
        if tokenizer.vocab_size > cfg.vocab_size:
            raise InteropError(
                f"{hf_dir / FILE_NAME} has {tokenizer.vocab_size} tokens, the model's vocabulary "
                f"only {cfg.vocab_size}: they do not belong together"
            )
        experiment = ExperimentConfig(
            name=workdir.name,
            model=cfg,
            objective=objective,
            data=DataConfig(
                tokenizer=str((hf_dir / FILE_NAME).resolve()),
                vocab_size=cfg.vocab_size,
                seq_len=min(DataConfig.seq_len, cfg.max_seq_len),
            ),
        )
        (folder / run_folder.HF).mkdir()
        for name, content in kept.items():
            (folder / run_folder.HF / name).write_bytes(content)
        checkpoints = Checkpoints(folder, experiment, packed=False)
        checkpoints.save_model(params, router_state)
        checkpoints.close()
        run_folder.claim_workdir(folder, experiment, tokenizer)
    if config_from_hf(opened.hf).mtp_depth > cfg.mtp_depth:
        print("the files hold no layers for multi-token prediction: imported without them")
    if files.unused():
        print(f"{GENERATION_CONFIG}: not used here: {', '.join(files.unused())}")
    print(
        f"{account.table()}\n{workdir}: {opened.hf['model_type']}, {count(params):,} parameters. "
        f'Try moejax generate --workdir={workdir} --prompt="..."'
    )


def _tokenizer_text(hf_dir: pathlib.Path) -> str:
    if not exists(hf_dir, FILE_NAME):
        raise InteropError(
            f"{hf_dir} has no {FILE_NAME}, without which no text can be encoded. `transformers` makes "
            "one: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
        )
    return read_text(hf_dir, FILE_NAME)


def _kept(hf_dir: pathlib.Path, name: str, ignore_keys: Collection[str]) -> bytes:
    """A file as a run keeps it: byte for byte, unless it has keys that are left out."""
    data = read_bytes(hf_dir, name)
    if not ignore_keys or name not in FILES or not name.endswith(".json"):
        return data
    values = parse_json(data, str(hf_dir / name))
    rest = {k: v for k, v in values.items() if k not in ignore_keys}
    return data if rest == values else as_json(rest)


def export_run(workdir: pathlib.Path, hf_dir: pathlib.Path, model_type: str | None = None) -> None:
    """Write the newest checkpoint of a run, with the files of its tokenizer, as a Hugging Face folder.

    An imported run gets its own config.json back, without the quantisation it no longer has.

    Raises:
      ConfigError: not a run; hf_dir is taken; the family cannot express the model, or is not known.
    """
    run = load_run(workdir, _host())
    kept_folder = workdir / run_folder.HF
    kept = {n: read_bytes(kept_folder, n) for n in KEPT if exists(kept_folder, n)}
    own = parse_json(kept[CONFIG], str(kept_folder / CONFIG)) if CONFIG in kept else {}
    model_type = model_type or own.get("model_type") or _only_family(run.cfg.model)
    config = own if own.get("model_type") == model_type else {}
    if not config or not _describes(config, run.cfg.model):
        tokens = {k: own[k] for k in token_ids(run.tokenizer) if k in own} or token_ids(
            run.tokenizer
        )
        config = {**config_to_hf(run.cfg.model, model_type, run.cfg.objective), **tokens}
    config = _stored_as(config, jax.tree.leaves(run.params))
    extra = dict(kept)
    if config != own:
        extra[CONFIG] = as_json(config)
    if kept:
        extra[FILE_NAME] = read_bytes(workdir, run_folder.TOKENIZER)
    else:
        extra |= own_files(run.tokenizer, run.cfg.model.max_seq_len)
    write_folder(
        hf_dir,
        run.cfg.model,
        run.params,
        run.router_state,
        model_type,
        extra_files=extra,
        progress=True,
    )
    stored = config.get("dtype") or config["torch_dtype"]
    print(f"{hf_dir}: {model_type}, step {run.step}, {count(run.params):,} parameters in {stored}")


def _only_family(cfg: ModelConfig) -> str:
    """The one family that can express the model; with several, or none, InteropError says so."""
    lost = {m.MODEL_TYPE: lost_fields(cfg, m.MODEL_TYPE) for m in FAMILIES.values()}
    able = [family for family in lost if not lost[family]]
    if len(able) == 1:
        return able[0]
    if able:
        raise InteropError(
            f"several families can express this model: --model_type={'|'.join(able)}"
        )
    reasons = [f"  - {family}: {'; '.join(what[:2])}" for family, what in lost.items()]
    raise InteropError(
        "no Hugging Face family that moejax writes can express this model:\n" + "\n".join(reasons)
    )


def _describes(hf: dict, cfg: ModelConfig) -> bool:
    """Whether a config.json still is the one of this model."""
    theirs = config_from_hf(hf)
    if not cfg.mtp_depth:  # it may have been left out of the files; see mapping.as_saved
        theirs = dataclasses.replace(theirs, mtp_depth=0)
    return architecture(theirs) == architecture(cfg)


def _stored_as(config: dict, arrays: list) -> dict:
    """The config.json of these weights, not quantised.

    `transformers` loads all of them in the one dtype that it names: of several, the one that holds the
    others, unless the file has named another of them from the start.
    """
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    name = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 and before
    if any(config.get(name) == a.dtype.name for a in arrays):
        return config
    return {**config, name: jnp.result_type(*arrays).name}


def _host() -> Layout | None:
    """Arrays only pass through, so they stay on the host, where there is most memory."""
    try:
        cpu = jax.devices("cpu")[:1]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None
    return Layout(make_mesh(MeshConfig(data=1), cpu), tuple(RULES.items()))

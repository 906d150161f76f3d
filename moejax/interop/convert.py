"""Between a Hugging Face folder and the folder of a run, both ways."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.axes import VOCAB
from moejax.config import (
    ComputeConfig,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
)
from moejax.data.separators import Separators
from moejax.data.tokenizer import FILE_NAME, JsonTokenizer, Tokenizer, load_tokenizer
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
from moejax.interop.hf_folder import CONFIG, HfFolder, open_folder
from moejax.interop.load import plan_model, read_model
from moejax.interop.mapping import Account, as_saved
from moejax.interop.more_tokens import pad_rows, with_tokens
from moejax.interop.own_files import as_json, own_files, token_ids
from moejax.interop.prompts import (
    FILES,
    GENERATION_CONFIG,
    PromptFiles,
    check_tokens,
    read_prompt_files,
    separators,
)
from moejax.interop.quantizer import Quantizer
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
from moejax.params import Tree, count
from moejax.runs import folder as run_folder
from moejax.runs.checkpoint import Checkpoints
from moejax.runs.open import load_run
from moejax.sharding import Layout, make_mesh
from moejax.weights import Format, is_weight

# Files of a checkpoint that a run keeps in folder.HF, so that `export` can write them again and
# `generate` can read what it needs.
KEPT = (*FILES, "vocab.json", "merges.txt")


class Source(NamedTuple):
    """A Hugging Face folder, of which everything but the tensors is read and found to fit together.

    Attributes:
      opened: config.json and the headers.
      experiment: its model, with a row for every token, what it was trained for, and its tokenizer.
      tokenizer: with the separators that its files name.
      prompts: what its files say about prompts.
      kept: content of the files that a run keeps, by name.
      more_rows: of the experiment's model than the files have.
    """

    opened: HfFolder
    experiment: ExperimentConfig
    tokenizer: JsonTokenizer
    prompts: PromptFiles
    kept: dict[str, bytes]
    more_rows: int

    def said_of_rows(self) -> str:
        """What is to be said of rows that `read_source` adds; nothing if it adds none."""
        if not self.more_rows:
            return ""
        rows = self.experiment.model.vocab_size - self.more_rows
        return (
            f"{FILE_NAME} has {self.more_rows} tokens more than the model's {rows} rows: rows were added "
            "for them, each the mean of the others"
        )

    def run_files(self) -> dict[str, bytes]:
        """What a run keeps, besides its config and tokenizer.json, by name in its folder."""
        return _run_files(self.kept, self.tokenizer)


def open_source(hf_dir: pathlib.Path, ignore_keys: Collection[str] = ()) -> Source:
    """Read a Hugging Face folder without `ignore_keys`, and without its tensors.

    Raises ConfigError: see `load_model`; no tokenizer.json, or one that does not fit.
    """
    opened = open_folder(hf_dir, ignore_keys)
    experiment = _config_of(opened)
    text = _tokenizer_text(hf_dir)
    check_tokenizer(text, str(hf_dir / FILE_NAME))
    prompts = read_prompt_files(hf_dir, ignore_keys)
    find = functools.partial(separators, prompts)
    tokenizer = JsonTokenizer(text, str(hf_dir / FILE_NAME), find)
    if not {"added_tokens_decoder", "added_tokens"} & set(ignore_keys):
        check_tokens(prompts, tokenizer)
    model = with_tokens(experiment.model, tokenizer.vocab_size, str(hf_dir / FILE_NAME))
    more = model.vocab_size - experiment.model.vocab_size
    data = dataclasses.replace(experiment.data, vocab_size=model.vocab_size)
    experiment = dataclasses.replace(experiment, model=model, data=data)
    kept = {name: _kept(hf_dir, name, ignore_keys) for name in KEPT if exists(hf_dir, name)}
    return Source(opened, experiment, tokenizer, prompts, kept, more)


def read_source(
    source: Source,
    dtype=None,
    layout: Layout | None = None,
    *,
    quantizer: Quantizer | None = None,
) -> tuple[ModelConfig, Tree, Tree, Account]:
    """`read_model` of a folder, with a progress bar and a row for every token.

    Raises as `load_model`; InteropError if rows are to be added to a table that the mesh cannot split.
    """
    theirs, parts = source.experiment.model.vocab_size - source.more_rows, 1
    if layout is not None:
        parts = layout.size(VOCAB)
    if source.more_rows and theirs % parts:
        raise InteropError(
            f"{source.opened.folder} has {theirs} rows, which {parts} devices cannot split, and gets "
            f"{source.more_rows} more: `moejax import` adds them; begin from that run"
        )
    cfg, params, router_state, account = read_model(
        source.opened, dtype, layout, quantizer=quantizer, progress=True
    )
    if source.more_rows:
        cfg = dataclasses.replace(cfg, vocab_size=source.experiment.model.vocab_size)
        params = pad_rows(params, cfg, layout)
    return cfg, params, router_state, account


def _config_of(opened: HfFolder) -> ExperimentConfig:
    """The experiment of an imported model: its model, what it was trained for, its tokenizer."""
    model = config_from_hf(opened.hf)
    model = as_saved(model, opened.hf["model_type"], opened.tensors)
    return ExperimentConfig(
        name=opened.folder.name,
        model=model,
        objective=objective_from_hf(opened.hf),
        data=DataConfig(
            # Not resolve(), which raises RuntimeError for a loop of links before Python 3.13.
            tokenizer=os.path.realpath(opened.folder / FILE_NAME),
            vocab_size=model.vocab_size,
            seq_len=min(DataConfig.seq_len, model.max_seq_len),
        ),
        compute=ComputeConfig(dtype=_compute_dtype(opened.hf)),
    )


def _compute_dtype(hf: dict) -> str:
    """What config.json names; float32 where it names nothing, or what moejax does not compute in (float16)."""
    named = hf.get("dtype") or hf.get("torch_dtype")
    return named if named in ("float32", "bfloat16") else "float32"


def tokenizer_of_run(
    workdir: pathlib.Path, cfg: ExperimentConfig
) -> tuple[Tokenizer, dict[str, bytes]]:
    """(the tokenizer of a run, the files that came with it if the run began from an import)."""
    hf, path = workdir / run_folder.HF, workdir / run_folder.TOKENIZER
    if not path.exists():
        return load_tokenizer(cfg.data), {}
    prompts, find = read_prompt_files(hf), None
    if prompts.imported:
        find = functools.partial(separators, prompts)
    tokenizer = JsonTokenizer(read_text(workdir, run_folder.TOKENIZER), str(path), find)
    kept = {name: read_bytes(hf, name) for name in KEPT if exists(hf, name)}
    return tokenizer, _run_files(kept, tokenizer) if prompts.imported else {}


def _run_files(kept: dict[str, bytes], tokenizer: JsonTokenizer) -> dict[str, bytes]:
    found = Separators(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    hf = {f"{run_folder.HF}/{name}": content for name, content in kept.items()}
    return {run_folder.SEPARATORS: found.to_json(), **hf}


def import_run(
    hf_dir: pathlib.Path,
    workdir: pathlib.Path,
    ignore_keys: Collection[str] = (),
    quantize: Format | None = None,
) -> None:
    """Make `workdir` a run: config.json, tokenizer.json, separators.json, hf/, and a checkpoint of step 0.

    The files are read, and kept, without `ignore_keys`. `quantize`: the format of matrices; None: as they are.

    It appears whole, when everything is written, or not at all. Nothing outside of it and of a
    temporary folder beside it is written.

    Raises:
      ConfigError: see `open_source`; workdir is taken.
    """
    source = open_source(hf_dir, ignore_keys)
    hf, experiment = source.opened.hf, dataclasses.replace(source.experiment, name=workdir.name)
    quantizer = None if quantize is None else Quantizer(quantize)
    size = plan_model(source.opened, quantizer).nbytes(quantizer)
    with whole_folder(workdir) as folder:
        need_space(folder, size)
        cfg, params, router_state, account = read_source(
            source, layout=_host(), quantizer=quantizer
        )
        checkpoints = Checkpoints(folder, experiment, packed=False)
        checkpoints.save_model(params, router_state)
        checkpoints.close()
        run_folder.claim_workdir(folder, experiment, source.tokenizer, files=source.run_files())
    if source.more_rows:
        print(source.said_of_rows())
    if config_from_hf(hf).mtp_depth > cfg.mtp_depth:
        print("the files hold no layers for multi-token prediction: imported without them")
    if source.prompts.unused():
        print(f"{GENERATION_CONFIG}: not used here: {', '.join(source.prompts.unused())}")
    if quantizer is not None:
        print(quantizer.table())
    print(
        f"{account.table()}\n{workdir}: {hf['model_type']}, {count(params):,} parameters, computed in "
        f'{experiment.compute.dtype}. Try moejax generate --workdir={workdir} --prompt="..."'
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
    model_type = model_type or own.get("model_type") or ""
    also: list[str] = []
    if not model_type:
        model_type, *also = _families(run.cfg.model)
    config = own if own.get("model_type") == model_type else {}
    if not config or not _describes(config, run.cfg.model):
        tokens = {k: own[k] for k in token_ids(run.tokenizer) if k in own} or token_ids(
            run.tokenizer
        )
        config = {**config_to_hf(run.cfg.model, model_type, run.cfg.objective), **tokens}
    config = _stored_as(config, jax.tree.leaves(run.params, is_leaf=is_weight))
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
    if also:
        print(f"other families that can express it: --model_type={'|'.join(also)}")


def _families(cfg: ModelConfig) -> list[str]:
    """The families that can express the model, the oldest first; InteropError says why there is none."""
    lost = {m.MODEL_TYPE: lost_fields(cfg, m.MODEL_TYPE) for m in FAMILIES.values()}
    able = [family for family in lost if not lost[family]]
    if able:
        return able
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

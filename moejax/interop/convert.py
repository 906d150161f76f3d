"""Between a Hugging Face folder and the folder of a run, both ways."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Collection

import jax

from moejax.config import (
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
)
from moejax.data.tokenizer import FILE_NAME, JsonTokenizer
from moejax.interop.files import (
    InteropError,
    exists,
    need_space,
    parse_json,
    read_bytes,
    whole_folder,
)
from moejax.interop.hf_folder import CONFIG, open_folder
from moejax.interop.load import read_model
from moejax.interop.prompts import (
    GENERATION_CONFIG,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG,
    read_prompt_files,
)
from moejax.interop.save import write_folder
from moejax.mesh import RULES
from moejax.models.zoo import FAMILIES, config_from_hf, config_to_hf, lost_fields
from moejax.models.zoo.architecture import architecture
from moejax.params import count
from moejax.runs import folder as run_folder
from moejax.runs.checkpoint import Checkpoints
from moejax.runs.open import OpenRun, load_run
from moejax.sharding import Layout, make_mesh

# Files of a checkpoint that a run keeps in folder.HF, so that `export` can write them again and
# `generate` can read what it needs.
KEPT = (
    CONFIG,
    TOKENIZER_CONFIG,
    GENERATION_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    TEMPLATE_FILE,
)


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
    text = _tokenizer_text(hf_dir)
    tokenizer = JsonTokenizer(text, str(hf_dir / FILE_NAME))
    read_prompt_files(hf_dir)  # for its errors
    kept = {name: read_bytes(hf_dir, name) for name in KEPT if exists(hf_dir, name)}
    if ignore_keys:
        kept[CONFIG] = (json.dumps(opened.hf, indent=2) + "\n").encode()
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
    try:
        return read_bytes(hf_dir, FILE_NAME).decode("utf-8")
    except UnicodeDecodeError as e:
        raise InteropError(f"{hf_dir / FILE_NAME}: not UTF-8 ({e})") from e


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
        config = {**config_to_hf(run.cfg.model, model_type), **_token_ids(run)}
    dtype = jax.tree.leaves(run.params)[0].dtype.name
    config = _stored_as(config, dtype)
    extra = dict(kept)
    if config != own:
        extra[CONFIG] = (json.dumps(config, indent=2) + "\n").encode()
    if exists(workdir, run_folder.TOKENIZER):
        extra[FILE_NAME] = read_bytes(workdir, run_folder.TOKENIZER)
        extra.setdefault(TOKENIZER_CONFIG, _tokenizer_config(run, extra[FILE_NAME]))
    write_folder(
        hf_dir,
        run.cfg.model,
        run.params,
        run.router_state,
        model_type,
        extra_files=extra,
        progress=True,
    )
    print(f"{hf_dir}: {model_type}, step {run.step}, {count(run.params):,} parameters in {dtype}")


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


def _stored_as(config: dict, dtype: str) -> dict:
    """The config.json of weights stored in `dtype`, not quantised."""
    config = {k: v for k, v in config.items() if k != "quantization_config"}
    name = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 and before
    return config if config.get(name) == dtype else {**config, name: dtype}


def _token_ids(run: OpenRun) -> dict:
    t = run.tokenizer
    return {"bos_token_id": t.bos_id, "eos_token_id": t.eos_id, "pad_token_id": t.pad_id}


def _tokenizer_config(run: OpenRun, tokenizer_json: bytes) -> bytes:
    """What `transformers` needs beside a tokenizer.json that moejax trained."""
    added = parse_json(tokenizer_json, FILE_NAME)["added_tokens"]
    names = {token["id"]: token["content"] for token in added}
    tokens = {key.removesuffix("_id"): names[i] for key, i in _token_ids(run).items()}
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": run.cfg.model.max_seq_len,
        **tokens,
    }
    return (json.dumps(values, indent=2) + "\n").encode()


def _host() -> Layout | None:
    """Arrays only pass through, so they stay on the host, where there is most memory."""
    try:
        cpu = jax.devices("cpu")[:1]
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return None
    return Layout(make_mesh(MeshConfig(data=1), cpu), tuple(RULES.items()))

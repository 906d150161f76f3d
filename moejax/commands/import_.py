"""`moejax import`: makes a run from a Hugging Face folder."""

import pathlib

from absl import flags

from moejax.commands.flags import parse_needed
from moejax.config import ConfigError
from moejax.interop.convert import import_run
from moejax.interop.quantizer import format_of
from moejax.weights import FORMATS

USAGE = "usage: moejax import --hf_dir=models/deepseek-moe-16b --workdir=runs/16b"


def main(argv: list[str]) -> int:
    """`moejax import ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    flags.DEFINE_string(
        "hf_dir", None, "Folder with config.json, safetensors and tokenizer.json.", flag_values=fv
    )
    flags.DEFINE_string("workdir", None, "Folder to make; must not exist.", flag_values=fv)
    flags.DEFINE_list(
        "ignore_keys", [], "Keys of its JSON files to ignore: clip_qkv,min_p.", flag_values=fv
    )
    flags.DEFINE_enum(
        "quantize",
        None,
        list(FORMATS),
        "Store matrices in fewer bits: int8 (a scale per output), int4 (and per block of inputs). Routers, "
        "norms, embeddings and head stay as they are. Such a run cannot be trained.",
        flag_values=fv,
    )
    flags.DEFINE_enum(
        "block", None, ["32", "64"], "Of int4: inputs that share a scale [32].", flag_values=fv
    )
    if parse_needed("import", USAGE, fv, argv, ("hf_dir", "workdir")):
        how = None if fv.quantize is None else format_of(fv.quantize, int(fv.block or 0))
        if how is None and fv.block:
            raise ConfigError("--block is of --quantize=int4")
        import_run(pathlib.Path(fv.hf_dir), pathlib.Path(fv.workdir), fv.ignore_keys, how)
    return 0

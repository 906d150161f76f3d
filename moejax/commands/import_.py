"""`moejax import`: makes a run from a Hugging Face folder."""

import pathlib

from absl import flags

from moejax.commands.flags import parse_needed
from moejax.interop.convert import import_run

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
    if parse_needed("import", USAGE, fv, argv, ("hf_dir", "workdir")):
        import_run(pathlib.Path(fv.hf_dir), pathlib.Path(fv.workdir), fv.ignore_keys)
    return 0

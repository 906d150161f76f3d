"""`moejax export`: writes the newest checkpoint of a run as a Hugging Face folder."""

import pathlib

from absl import flags

from moejax.commands.flags import parse_needed
from moejax.interop.convert import export_run

USAGE = "usage: moejax export --workdir=runs/16b --hf_dir=models/mine [--model_type=deepseek]"


def main(argv: list[str]) -> int:
    """`moejax export ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder of a run.", flag_values=fv)
    flags.DEFINE_string("hf_dir", None, "Folder to make; must not exist.", flag_values=fv)
    flags.DEFINE_string(
        "model_type",
        None,
        "Family to write [that of the import, or the one that fits].",
        flag_values=fv,
    )
    if parse_needed("export", USAGE, fv, argv, ("workdir", "hf_dir")):
        export_run(pathlib.Path(fv.workdir), pathlib.Path(fv.hf_dir), fv.model_type)
    return 0

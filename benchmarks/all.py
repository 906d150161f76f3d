"""All benchmarks, one after the other, as one table.

    python -m benchmarks.all --torch_python=PATH          # CPU; PATH has torch and transformers
    python -m benchmarks.all --tiny                       # toy sizes, to test the scripts

Each runs in a process of its own, so that none inherits another's memory or caches. `benchmarks.gpu` is for one
GPU, and not among them.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from benchmarks import common

TORCH = flags.DEFINE_string(
    "torch_python", sys.executable, "A Python that has torch and transformers; '' leaves them out."
)
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes, to test the scripts.")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")

# Name of the benchmark: those of the flags above that it takes.
BENCHMARKS = {
    "layer": (),
    "step": (TORCH,),
    "generate": (TORCH,),
    "attention": (),
    "compile": (),
}


def run(name: str, folder: str) -> dict | None:
    """The result of one benchmark; None if it failed."""
    output = pathlib.Path(folder) / f"{name}.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", f"--json={output}"]
    command += [f"--{flag.name}={flag.value}" for flag in BENCHMARKS[name]]
    command += ["--tiny"] if TINY.value else []
    if subprocess.run(command).returncode:
        return None
    return json.loads(output.read_text())


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    names = list(BENCHMARKS)
    if not TORCH.value:
        print("--torch_python= leaves out: generate, and the step against torch")
        names = [n for n in names if n != "generate"]
    with tempfile.TemporaryDirectory() as folder:
        results = {n: run(n, folder) for n in names}
    tables = [r for r in results.values() if r]
    columns = ("benchmark", "goal", "measured", "result")
    rows = [{c: row[c] for c in columns} for r in tables for row in r["rows"] if "goal" in row]
    if rows:
        print(f"\nAll benchmarks ({tables[0]['machine']})\n")
        common.print_table(rows)
    if OUTPUT.value:
        common.write_json(OUTPUT.value, tables)
    failed = [n for n, r in results.items() if not r]
    if failed:
        raise SystemExit(f"these did not finish (see above): {', '.join(failed)}")


if __name__ == "__main__":
    app.run(main)

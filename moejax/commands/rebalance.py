"""`moejax rebalance`: where to put experts, and which of them twice, so that devices have equal loads."""

import json
import pathlib

import numpy as np
from absl import flags

from moejax.commands.flags import parse_needed
from moejax.config import ConfigError
from moejax.evals.analysis.placement import device_load, imbalance, in_order, rebalance
from moejax.runs import folder
from moejax.text import Table, render

USAGE = """\
usage: moejax rebalance --loads=FILE.json --devices=8         a table of layers by experts
       moejax rebalance --workdir=RUN --devices=8             the loads that moejax analyze counted
   e.g. moejax rebalance --workdir=RUN --replicas=40 --devices=8 --nodes=2 --groups=4 --json=placement.json"""


def main(argv: list[str]) -> int:
    """`moejax rebalance ...`; argv without the command's name. Raises ConfigError for bad input."""
    fv = flags.FlagValues()
    text, whole = flags.DEFINE_string, flags.DEFINE_integer
    text("loads", None, "JSON: routes to each expert, a list per layer.", flag_values=fv)
    text("workdir", None, "Folder of an analysed run, or of its analysis.", flag_values=fv)
    whole("devices", None, "Devices of all nodes together.", flag_values=fv, lower_bound=1)
    whole("replicas", None, "Slots for experts on all devices [one each].", flag_values=fv)
    whole("groups", 1, "Groups of experts that should share a node.", flag_values=fv)
    whole("nodes", 1, "Nodes; groups are kept together if they divide.", flag_values=fv)
    text("json", None, "Also write the placement to this file.", flag_values=fv)
    if not parse_needed("rebalance", USAGE, fv, argv, ("devices",)):
        return 0
    if bool(fv.loads) == bool(fv.workdir):
        raise ConfigError(f"rebalance needs either --loads or --workdir\n{USAGE}")
    if fv.json and not pathlib.Path(fv.json).absolute().parent.is_dir():
        raise ConfigError(f"--json={fv.json}: there is no such folder")
    load_LE = read_loads(pathlib.Path(fv.loads or fv.workdir))
    replicas = fv.replicas or -(-load_LE.shape[1] // fv.devices) * fv.devices
    placed = rebalance(load_LE, replicas, fv.groups, fv.nodes, fv.devices)
    print(render([_table(load_LE, placed, fv.devices, replicas)]))
    if fv.json:
        out = {"expert_of_slot": placed.expert_LP.tolist(), "devices": fv.devices}
        pathlib.Path(fv.json).write_text(json.dumps(out) + "\n")
    return 0


def _table(load_LE, placed, devices: int, replicas: int) -> Table:
    experts = load_LE.shape[1]
    after_L = imbalance(device_load(load_LE, placed, devices))
    before_L = np.full(len(load_LE), np.nan)
    if experts % devices == 0:
        usual = in_order(*load_LE.shape)
        before_L = imbalance(device_load(load_LE, usual, devices))
    cell = lambda x: "-" if np.isnan(x) else f"{x:.3f}"  # noqa: E731
    rows = [[str(i), cell(b), cell(a)] for i, (b, a) in enumerate(zip(before_L, after_L))]
    rows.append(["all", cell(before_L.mean()), cell(after_L.mean())])
    return Table(
        f"{experts} experts in {replicas} slots on {devices} devices",
        ["MoE layer", "in their order", "rebalanced"],
        rows,
        "Load of the fullest device over the mean: 1 is best. In their order: each expert once.",
    )


def read_loads(path: pathlib.Path) -> np.ndarray:
    """[L, E] of a JSON table, or of the analysis in a folder. ConfigError if it is none."""
    analysed = path.is_dir()
    file = path / folder.ANALYSIS if analysed else path
    if not file.is_file():
        hint = f"; moejax analyze --workdir={path} writes it" if analysed else ""
        raise ConfigError(f"{file}: there is no such file{hint}")
    try:
        found = json.loads(file.read_text("utf-8"))
        return np.array(found["load"] if isinstance(found, dict) else found, np.float64)
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise ConfigError(
            f"{file} holds no loads: a JSON list of equally long lists of numbers would work"
        ) from e

"""Every notebook runs from top to bottom, on a model small enough for a test."""

import os
import pathlib

import nbclient
import nbformat
import pytest
import tiny

ROOT = pathlib.Path(__file__).parent.parent
TINY = tiny.OVERRIDES | {
    "train.steps": 6,
    "train.log_every": 2,
    "train.eval_every": 3,
    "mesh.data": 1,
}


IMAGES = {
    **{"quickstart.ipynb": 3, "router.ipynb": 2, "microscope.ipynb": 1},
    **{"layer.ipynb": 3, "cost.ipynb": 4, "devices.ipynb": 2},
}
SAID = {
    "layer.ipynb": ("the same sums, expert by expert", "moejax agrees with the loop"),
    "cost.ipynb": ("16.38B in total", "Training on 64 x h100"),
    "devices.ipynb": ("of which a device has: (1, 2, 32, 32)", "'all-to-all': 5", "fsdp=8"),
    "microscope.ipynb": ("expert  0:", "taken away", "wrote", "imported"),
    "router.ipynb": ("holds: carry", "broken: causality", "mine            held-out loss"),
}


@pytest.mark.filterwarnings("ignore")  # of Jupyter's own libraries; the kernel is another process
@pytest.mark.product  # they train, in processes of their own
@pytest.mark.parametrize("name", IMAGES)
def test_notebook_runs(name, tmp_path, monkeypatch):
    path = ROOT / "notebooks" / name
    notebook = nbformat.read(path, as_version=4)
    at = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]
    assert len(at) == 1, "one cell is tagged 'parameters'"
    values = f"WORKDIR = {str(tmp_path / 'run')!r}\nOVERRIDES = {TINY!r}\nBATCHES = 2"
    notebook.cells.insert(at[0] + 1, nbformat.v4.new_code_cell(values))
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", "cpu")
    # Unoptimised code is compiled faster.
    monkeypatch.setitem(os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()  # an error in a cell is raised, with its traceback
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(images) == IMAGES[path.name]
    assert (tmp_path / "run" / "report.html").exists() == (path.name == "quickstart.ipynb")
    said = "".join(o.get("text", "") for o in outputs)
    assert all(text in said for text in SAID.get(path.name, ())), said


def test_every_notebook_is_run():
    assert {p.name for p in (ROOT / "notebooks").glob("*.ipynb")} == set(IMAGES)


def test_notebooks_are_stored_without_outputs():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        code = [c for c in notebook.cells if c.cell_type == "code"]
        assert all(not c.outputs and c.execution_count is None for c in code), path

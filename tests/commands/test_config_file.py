"""The file of an experiment, and the files beside it."""

import sys

from moejax.commands.flags import experiment


def test_a_config_may_import_the_files_beside_it(tmp_path):
    """Of two folders each its own, whatever was imported before."""
    for name, steps in (("one", 3), ("two", 4)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "beside.py").write_text(f"STEPS = {steps}\n")
        (folder / "x.py").write_text(
            "from beside import STEPS\n"
            "from moejax.config import ExperimentConfig, TrainConfig\n"
            "from moejax.config_io import to_config_dict\n"
            "def get_config():\n"
            "    return to_config_dict(ExperimentConfig(train=TrainConfig(steps=STEPS)))\n"
        )
    path = list(sys.path)
    for name, steps in (("one", 3), ("two", 4), ("one", 3)):
        assert experiment(str(tmp_path / name / "x.py"), []).train.steps == steps
    assert sys.path == path and "beside" not in sys.modules

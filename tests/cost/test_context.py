"""What a longer context costs: the curves of the cost model go through what programs do, and are drawn."""

import pytest

from benchmarks.context import ATTENTIONS, measured, toy
from moejax.commands.models import main
from moejax.config import ConfigError
from moejax.cost.architecture import of_model
from moejax.cost.context_plot import decoded


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("context", [256, 1024, 16384])
def test_a_decoding_step_does_what_the_cost_model_counts(name, context):
    cfg = toy(ATTENTIONS[name])
    assert measured(cfg, context) == decoded(of_model(cfg), context)  # counts: no rounding


def test_the_picture(tmp_path, capsys):
    target = tmp_path / "x.svg"
    assert main(["deepseek-v3.2", "llama-2-70b", f"--context_plot={target}", "--format=csv"]) == 0
    assert "<svg" in target.read_text() and str(target) in capsys.readouterr().err
    with pytest.raises(ConfigError, match="gpt-4: its attention is not published"):
        main(["gpt-4", f"--context_plot={target}"])
    with pytest.raises(ConfigError, match="does not exist"):
        main(["gpt-2", f"--context_plot={tmp_path}/none/x.png"])

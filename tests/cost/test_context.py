"""What a longer context costs: the curves of the cost model go through what programs do, and are drawn."""

import pytest
from matplotlib.figure import Figure

from benchmarks.context import ATTENTIONS, measured, toy
from moejax.commands.models import main
from moejax.config import ConfigError
from moejax.cost.architecture import of_model
from moejax.cost.context_plot import decoded, draw

EXACT = ("multi-head", "grouped-query", "latent")


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("context", [256, 1024, 16384])
def test_a_decoding_step_does_what_the_cost_model_counts(name, context):
    cfg = toy(ATTENTIONS[name])
    assert measured(cfg, context) == decoded(of_model(cfg), context)  # counts: no rounding


@pytest.mark.parametrize("name", [n for n in ATTENTIONS if n not in EXACT])
def test_a_decoding_step_reads_only_what_an_indexer_chooses(name):
    """The cost model leaves out the sum over the indexer's heads, 1 for each 16 channels here, and the tokens
    of windows that are not full."""
    cfg = toy(ATTENTIONS[name])
    (flops, size), (counted, counted_size) = measured(cfg, 16384), decoded(of_model(cfg), 16384)
    assert counted < flops < 1.05 * counted
    assert counted_size <= size < 1.02 * counted_size


def test_the_curves_are_those_of_the_cost_model():
    arch, at = of_model(toy(ATTENTIONS["latent"])), {512: (7.0, 8.0)}
    panels = Figure().subplots(1, 2)
    draw(panels, {"a": arch}, (256, 512, 2**16), {"a": at})
    for panel, axes in enumerate(panels):
        known, beyond, dots = axes.lines
        values = {n: decoded(arch, n)[panel] for n in (256, 512, 2**16)}
        assert dict(zip(known.get_xdata(), known.get_ydata())) == {
            n: v for n, v in values.items() if n <= arch.max_seq_len
        }
        assert list(beyond.get_ydata()) == [values[512], values[2**16]]
        assert list(dots.get_ydata()) == [at[512][panel]]


def test_the_picture(tmp_path, capsys):
    target = tmp_path / "x.svg"
    assert main(["deepseek-v3.2", "llama-2-70b", f"--context_plot={target}", "--format=csv"]) == 0
    assert "<svg" in target.read_text() and str(target) in capsys.readouterr().err
    with pytest.raises(ConfigError, match="gpt-4: its attention is not published"):
        main(["gpt-4", f"--context_plot={target}"])
    with pytest.raises(ConfigError, match=r"--context_plot=.*does not exist"):
        main(["gpt-2", f"--context_plot={tmp_path}/none/x.png"])

"""Fine-tune a run, or a Hugging Face folder, on other text, all its parameters.

    moejax train --config=experiments/finetune.py:runs/16b --workdir=runs/finetuned \\
        --config.data.sources="('mine=texts/*.txt',)"

The name after the colon is `train.init_from`: the run, one of its checkpoints (runs/16b/checkpoints/300) or the
Hugging Face folder whose weights and tokenizer are taken. It is only read. Model, objective and tokenizer are
not mentioned here, and so are its own. Result: none claimed; it is a starting point.
"""

from moejax.config import ConfigError, ExperimentConfig, OptimizerConfig, TrainConfig
from moejax.config_io import to_config_dict


def get_config(base: str = ""):
    if not base:
        raise ConfigError("name what to fine-tune: --config=experiments/finetune.py:RUN")
    cfg = ExperimentConfig(
        name="finetune",
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_steps=20),
        train=TrainConfig(steps=200, init_from=base),
    )
    return to_config_dict(cfg)

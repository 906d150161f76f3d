"""Fine-tune an imported (or trained) run on other text, all its parameters.

    moejax import --hf_dir=models/deepseek-moe-16b --workdir=runs/finetuned
    moejax train --config=experiments/finetune.py:runs/finetuned --workdir=runs/finetuned \\
        --config.data.sources="('mine=texts/*.txt',)"

The name after the colon is the run whose model and tokenizer are taken: an import may be trained on anything,
while a run that has trained here goes on with its own data only. Result: none claimed; it is a starting point.
"""

import dataclasses
import pathlib

from moejax.config import ConfigError, OptimizerConfig, TrainConfig
from moejax.config_io import to_config_dict
from moejax.runs.open import read_config


def get_config(workdir: str = ""):
    if not workdir:
        raise ConfigError("name the run to fine-tune: --config=experiments/finetune.py:RUN")
    cfg = read_config(pathlib.Path(workdir))
    cfg = dataclasses.replace(
        cfg,
        optimizer=OptimizerConfig(learning_rate=1e-5, schedule="cosine", warmup_steps=20),
        train=TrainConfig(steps=200),
    )
    return to_config_dict(cfg)

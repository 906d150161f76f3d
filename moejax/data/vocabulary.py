"""How many rows a model has for tokens: as many as the tokenizer has, or more."""

import dataclasses

from moejax.config import ConfigError, DataConfig, ExperimentConfig
from moejax.data.tokenizer import load_tokenizer


def with_vocabulary(cfg: ExperimentConfig, tokens: int) -> ExperimentConfig:
    """The config with a row for each of the tokenizer's `tokens`, unless it says how many.

    There may be more rows than tokens, as in published models. ConfigError if there are fewer.
    """
    given = cfg.model.vocab_size
    if not given:
        return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=tokens))
    if given < tokens:
        smaller = f", or --config.data.vocab_size={given}" * (cfg.data.tokenizer == "bpe")
        raise ConfigError(
            f"model.vocab_size={given}, but the tokenizer has {tokens} tokens (data.tokenizer="
            f"{cfg.data.tokenizer!r}): --config.model.vocab_size={tokens} would work, or 0, which means as "
            f"many as it has{smaller}"
        )
    return cfg


def expected_tokens(cfg: DataConfig) -> int:
    """How many tokens the tokenizer of a config has; of a BPE to be trained, how many are asked for."""
    return cfg.vocab_size if cfg.tokenizer == "bpe" else load_tokenizer(cfg).vocab_size

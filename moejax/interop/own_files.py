"""The files beside the tensors of a run trained here, as `transformers` and `moejax import` read them."""

import json

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from moejax.data.separators import PADDING, SEPARATOR
from moejax.data.tokenizer import FILE_NAME, JsonTokenizer, Tokenizer, byte_alphabet
from moejax.interop.prompts import DEFAULTS, GENERATION_CONFIG, MAX_NEW, TOKENIZER_CONFIG


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that a config.json names."""
    t = tokenizer
    return {"bos_token_id": t.bos_id, "eos_token_id": t.eos_id, "pad_token_id": t.pad_id}


def own_files(tokenizer: Tokenizer, max_seq_len: int) -> dict[str, bytes]:
    """What such a run relies on, name -> content: its tokenizer, that documents begin and end with a
    separator, and how text is written unless asked otherwise."""
    ids = token_ids(tokenizer)
    described = framed(tokenizer)
    names = {token["id"]: token["content"] for token in described["added_tokens"]}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
        **{key.removesuffix("_id"): names[i] for key, i in ids.items()},
    }
    generation = {**ids, "do_sample": True, **DEFAULTS, "max_new_tokens": MAX_NEW}
    return {
        FILE_NAME: json.dumps(described, ensure_ascii=False).encode(),
        TOKENIZER_CONFIG: as_json(tokenizer_config),
        GENERATION_CONFIG: as_json(generation),
    }


def as_json(values: dict) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def framed(tokenizer: Tokenizer) -> dict:
    """A tokenizer.json that encodes as this tokenizer and begins every text with its separator, as moejax
    does with prompts and documents."""
    text = tokenizer.text if isinstance(tokenizer, JsonTokenizer) else _bytes_json()
    described = json.loads(text)
    i = tokenizer.bos_id
    bos = next(t["content"] for t in described["added_tokens"] if t["id"] == i)
    begin, a, b = (
        {kind: {"id": name, "type_id": 0}}
        for kind, name in (("SpecialToken", bos), ("Sequence", "A"), ("Sequence", "B"))
    )
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, a],
        "pair": [begin, a, begin, b],
        "special_tokens": {bos: {"id": bos, "ids": [i], "tokens": [bos]}},
    }
    return described | {"truncation": None, "padding": None}


def _bytes_json() -> str:
    """`ByteTokenizer` as a BPE without merges."""
    made = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore[reportAttributeAccessIssue]
    made.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    made.add_special_tokens([SEPARATOR, PADDING])
    return made.to_str()

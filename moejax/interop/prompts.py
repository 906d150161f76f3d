"""What a checkpoint's files say about prompts: special tokens, chat template, what ends a text, sampling.

One reader, with the order of precedence of `transformers` 5. Special tokens: tokenizer_config.json, over which
special_tokens_map.json goes where the former has no added_tokens_decoder. Template: chat_template.jinja,
then tokenizer_config.json. Sampling: generation_config.json. A text ends at every end token that any file
names. Ids, and what is put around a text, are those of tokenizer.json, with which the others must agree.

The files are kept in the folder of an imported run (`runs.folder.HF`); a run trained here has none of them,
and then a prompt is the start of a document.
"""

import pathlib
from collections.abc import Collection
from typing import Any, NamedTuple

from moejax.config import ConfigError
from moejax.data.separators import Separators, by_names
from moejax.data.tokenizer import FILE_NAME, MOST_TOKENS, JsonTokenizer, Tokenizer
from moejax.interop.files import InteropError, exists, read_json, read_text
from moejax.models.zoo.keys import words
from moejax.text import plain, shown

MODEL_CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
ADDED_TOKENS = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
GENERATION_CONFIG = "generation_config.json"
FILES = (
    *(MODEL_CONFIG, TOKENIZER_CONFIG, SPECIAL_TOKENS, ADDED_TOKENS, TEMPLATE_FILE),
    GENERATION_CONFIG,
)
# What is read of generation_config.json: type, least, most, whether a list of them will do, in words.
GENERATION_VALUES = {
    "eos_token_id": (int, 0, MOST_TOKENS, True, "a token id, or a list of them"),
    "temperature": (int | float, 0, 1e6, False, "a number from 0 on"),
    "top_k": (int, 0, MOST_TOKENS, False, "a whole number from 0 on"),
    "top_p": (int | float, 1e-9, 1, False, "a number above 0, at most 1"),
    "max_new_tokens": (int, 1, MOST_TOKENS, False, "a positive whole number"),
    "do_sample": (bool, False, True, False, "true or false"),
    "stop_strings": (str, "", chr(0x10FFFF), True, "a text, or a list of them"),
}
# Changes nothing of what is written: caches, speed, what else is returned, what counts with beams only.
GENERATION_HARMLESS = words(
    """
    assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind
    bos_token_id cache_config cache_implementation compile_config continuous_batching_config
    decoder_start_token_id disable_compile early_stopping is_assistant length_penalty low_memory
    max_cache_len max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    output_attentions output_hidden_states output_logits output_scores pad_token_id prefill_chunk_size
    prompt_lookup_num_tokens remove_invalid_values renormalize_logits return_dict_in_generate
    speculation_type target_lookbehind transformers_version trust_remote_code use_cache use_mtp
    """
)
GENERATION_UNUSED = ("max_length", "max_time")  # import prints a line
# Would change the text, but for these values.
GENERATION_NEUTRAL = {
    "diversity_penalty": 0.0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0.0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "repetition_penalty": 1.0,
    "token_healing": False,
    "typical_p": 1.0,
}
MOST_BYTES = 10_000_000  # of a file here; published ones have a few hundred kB at most
# Where neither the user nor a generation_config.json says anything.
DEFAULTS = {"temperature": 0.8, "top_k": 0, "top_p": 0.95}
MAX_NEW = 200


class PromptFiles(NamedTuple):
    """Attributes:
    folder: where they were looked for.
    imported: whether there are any: what else is in them is then a file's word, not a default.
    special: bos_token, eos_token, ..: their texts.
    added: text -> (id, whether it is special), as files beside tokenizer.json have it.
    end_ids: ids that end a text, besides that of `special["eos_token"]`.
    generation: generation_config.json, checked; {} where there is none.
    template: the chat template, or None.
    """

    folder: pathlib.Path
    imported: bool
    special: dict[str, str]
    added: dict[str, tuple[int, bool | None]]
    end_ids: tuple[int, ...]
    generation: dict[str, Any]
    template: str | None

    def unused(self) -> list[str]:
        """What generation_config.json says and is not used here, as 'key=value'."""
        given = ((k, self.generation.get(k)) for k in GENERATION_UNUSED)
        return [f"{k}={shown(v)}" for k, v in given if v is not None]


def read_prompt_files(folder: pathlib.Path, ignore_keys: Collection[str] = ()) -> PromptFiles:
    """The files in `folder`, read without `ignore_keys`. Raises ConfigError naming a file, or a value, that
    is not what it should be or that changes the text in a way unknown here."""

    def read(name: str) -> dict[str, Any]:
        values = read_json(folder, name, MOST_BYTES) if exists(folder, name) else {}
        return {k: v for k, v in values.items() if k not in ignore_keys}

    tokenizer_config, generation = read(TOKENIZER_CONFIG), read(GENERATION_CONFIG)
    _check_generation(folder / GENERATION_CONFIG, generation)
    special = _special(folder / TOKENIZER_CONFIG, tokenizer_config)
    added = _added(folder / TOKENIZER_CONFIG, tokenizer_config.get("added_tokens_decoder"))
    if added is None:
        special |= _special(folder / SPECIAL_TOKENS, read(SPECIAL_TOKENS))
        added = _legacy_added(folder / ADDED_TOKENS, read(ADDED_TOKENS))
    model = {"eos_token_id": read(MODEL_CONFIG).get("eos_token_id")}
    _check_values(folder / MODEL_CONFIG, model)
    return PromptFiles(
        folder,
        any(exists(folder, name) for name in FILES),
        special,
        added,
        tuple(several(generation, "eos_token_id") + several(model, "eos_token_id")),
        generation,
        _template(folder, tokenizer_config),
    )


def check_tokens(files: PromptFiles, tokenizer: JsonTokenizer) -> None:
    """InteropError if the other files name tokens that tokenizer.json has not, or has otherwise.

    `transformers` would add them, or make them special, while it reads; saving its tokenizer writes the result.
    """
    named = {t: (tokenizer.token_id(t), True) for t in files.special.values()}
    for token, (i, special) in (named | files.added).items():
        have = tokenizer.token_id(token)
        if have is None or have != i or (special and token not in tokenizer.special):
            is_ = "missing" if have is None else f"token {have}"
            kind = "" if have is None or token in tokenizer.special else ", and no special one"
            raise InteropError(
                f"{files.folder}: the files beside tokenizer.json name the special token {shown(token)}"
                f"{'' if i is None else f' with id {i}'}; in tokenizer.json it is {is_}{kind}. "
                "`transformers` makes them agree: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
            )


def separators(files: PromptFiles, tokenizer: JsonTokenizer) -> Separators:
    """What stands around a document of the model with these files: what its tokenizer.json puts before every
    text, else its bos_token, else the end again; its eos_token, else an end that its files name. Published
    names decide only where the files say nothing."""
    named = {key: tokenizer.special.get(text) for key, text in files.special.items()}
    ends = [named.get("eos_token"), *(i for i in files.end_ids if i in tokenizer.special.values())]
    eos = next((i for i in ends if i is not None), None)
    if eos is None:
        usual = by_names(tokenizer.special, str(files.folder / FILE_NAME))
    else:
        usual = Separators(eos, eos, eos)
    before = _before(tokenizer)
    bos = before if before is not None else named.get("bos_token")
    pad = named.get("pad_token")
    return Separators(
        usual.bos_id if bos is None else bos, usual.eos_id, usual.pad_id if pad is None else pad
    )


def _before(tokenizer: JsonTokenizer) -> int | None:
    """The first token that its tokenizer.json puts before every text; None if there is none."""
    plain, framed = tokenizer.encode("a"), tokenizer.encode_framed("a")
    return framed[0] if framed and framed[:1] != plain[:1] else None


def several(values: dict, key: str) -> list:
    """A value that may be one or a list, as a list."""
    value = values.get(key)
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_values(where: pathlib.Path, values: dict) -> None:
    for key, (kind, least, most, several, text) in GENERATION_VALUES.items():
        value = values.get(key)
        given = value if several and isinstance(value, list) else [value]
        if value is not None and not all(
            isinstance(v, kind) and isinstance(v, bool) == (kind is bool) and least <= v <= most
            for v in given
        ):
            raise ConfigError(
                f"{where}: {key}={shown(value)} must be {text}; correct it or leave it out"
            )


def _check_generation(where: pathlib.Path, generation: dict) -> None:
    _check_values(where, generation)
    known = GENERATION_VALUES.keys() | GENERATION_HARMLESS | set(GENERATION_UNUSED)
    unknown = [
        key
        for key, value in generation.items()
        if key not in known
        and value is not None
        and not key.startswith("_")
        and not (key in GENERATION_NEUTRAL and value == GENERATION_NEUTRAL[key])
    ]
    if unknown:
        raise ConfigError(
            f"{where}: {', '.join(f'{plain(k)}={shown(generation[k])}' for k in unknown[:6])}: "
            "moejax writes text without that. To go on without: moejax import "
            f"--ignore_keys={','.join(unknown[:6])}"
        )


def _token(where: pathlib.Path, key: str, value: Any) -> str:
    """The text of a token that is given as such, or as an object."""
    text = value.get("content") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {plain(key)}={shown(value)} must be a token's text")
    return text


def _special(where: pathlib.Path, values: dict) -> dict[str, str]:
    return {
        key: _token(where, key, value)
        for key, value in values.items()
        if key.endswith("_token")
        and not isinstance(value, bool | None)  # add_bos_token is a switch
    }


def _added(where: pathlib.Path, decoder: Any) -> dict[str, tuple[int, bool | None]] | None:
    """added_tokens_decoder, id -> token; None where there is none."""
    if decoder is None:
        return None
    good = isinstance(decoder, dict)
    if not good or not all(
        k.isdecimal() and len(k) < 10 and isinstance(v, dict) for k, v in decoder.items()
    ):
        raise ConfigError(
            f"{where}: added_tokens_decoder={shown(decoder)} must be an object of tokens by id"
        )
    return {
        _token(where, f"added_tokens_decoder.{i}", token): (int(i), token.get("special") is True)
        for i, token in decoder.items()
    }


def _legacy_added(where: pathlib.Path, added: dict) -> dict[str, tuple[int, bool | None]]:
    """added_tokens.json, token -> id."""
    bad = [token for token, i in added.items() if type(i) is not int]
    if bad:
        raise ConfigError(
            f"{where}: {shown(bad[0])} must have a token id, not {shown(added[bad[0]])}"
        )
    return {token: (i, None) for token, i in added.items()}


def _template(folder: pathlib.Path, tokenizer_config: dict) -> str | None:
    if exists(folder, TEMPLATE_FILE):
        return read_text(folder, TEMPLATE_FILE, MOST_BYTES)
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):  # several by name
        named = [(t.get("name"), t.get("template")) for t in template if isinstance(t, dict)]
        template = next((text for name, text in named if name == "default"), None)
    if not isinstance(template, str | None):
        raise ConfigError(f"{folder / TOKENIZER_CONFIG}: chat_template is not a text")
    return template


def encode_prompt(files: PromptFiles, text: str, tokenizer: Tokenizer) -> list[int]:
    """Token ids of the start of a document: after the separator; of an imported model, with what its
    tokenizer.json puts around every text."""
    if files.imported and isinstance(tokenizer, JsonTokenizer):
        ids = tokenizer.encode_framed(text)
    else:
        ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    # An empty prompt starts with the separator in any case: there must be something to continue.
    return ids or [tokenizer.bos_id]


def stop_ids(
    files: PromptFiles, tokenizer: Tokenizer, stop_texts: Collection[str] = ()
) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's, those that any file names, and those of the stop texts that are
    special tokens, which never become text."""
    ids = {tokenizer.eos_id, *files.end_ids}
    if isinstance(tokenizer, JsonTokenizer):
        named = (files.special.get("eos_token"), *stop_texts)
        ids |= {tokenizer.special[t] for t in named if t in tokenizer.special}
    return tuple(sorted(ids))


def sampling_options(
    given: dict[str, Any], published: dict[str, Any], vocab_size: int
) -> dict[str, Any]:
    """temperature, top_k and top_p: as given, else as in a checkpoint's generation_config.json, else
    DEFAULTS. `transformers` reads a file without do_sample as greedy, and without top_k as 50; so do we."""
    options = dict(DEFAULTS)
    if published:
        silent = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
        options = {k: v if published.get(k) is None else published[k] for k, v in silent.items()}
        options["top_k"] = min(options["top_k"], vocab_size)
        if not published.get("do_sample", False):
            options["temperature"] = 0.0
    return options | {k: v for k, v in given.items() if v is not None}

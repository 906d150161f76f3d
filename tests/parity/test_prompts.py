"""Tokens, templates, ends and sampling of a folder mean here what they mean to `transformers`, both ways."""

import json

import jax
import numpy as np
import parity_oracle as oracle
import pytest
import tokenizers
import torch
import transformers
from parity_cases import BASE
from parity_shapes import GQA, Case
from tokenizers import decoders, models, pre_tokenizers, processors

from moejax.config import DataConfig, ExperimentConfig, ModelConfig, MoEConfig
from moejax.data.tokenizer import PADDING, SEPARATOR, ByteTokenizer, JsonTokenizer
from moejax.evals.chat import render_chat
from moejax.evals.writer import Writer
from moejax.interop import convert, prompts
from moejax.models import transformer
from moejax.params import init_params
from moejax.routers import router_options
from moejax.runs.checkpoint import Checkpoints
from moejax.runs.folder import claim_workdir

TEXTS = ["", "ab c", "  two  spaces ", "é ñ 中文 🙂", "a\n\tb", "it's <|x|> "]
TALK = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]


def write_tokenizer(folder, specials, frame=None):
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [tokenizers.AddedToken(s, special=True, normalized=False) for s in specials]
    )
    if frame:
        ids = [(t, made.token_to_id(t)) for t in frame.split() if t != "$A"]
        made.post_processor = processors.TemplateProcessing(single=frame, special_tokens=ids)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    return made


def files(folder, **contents):
    for name, content in contents.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)


DECODER = {"256": {"content": "</s>", "special": True}, "257": {"content": "<s>", "special": True}}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role | tojson(indent=1) }}{% generation %}{{ m.content }}"
    "{% endgeneration %}{{ eos_token }}{{ pad_token }}{% endfor %}"
)
FOLDERS = {
    "tokenizer_config": {"tokenizer_config__json": {"bos_token": "<s>", "eos_token": "</s>"}},
    "map": {
        "tokenizer_config__json": {"bos_token": "</s>"},
        "special_tokens_map__json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
    },
    "map beside a decoder": {
        "tokenizer_config__json": {"bos_token": "<s>", "added_tokens_decoder": DECODER},
        "special_tokens_map__json": {"bos_token": "</s>", "eos_token": "</s>"},
    },
    "add_bos_token": {"tokenizer_config__json": {"bos_token": "<s>", "add_bos_token": True}},
    "template file": {
        "tokenizer_config__json": {"bos_token": "<s>", "chat_template": "no"},
        "chat_template__jinja": "file " + TEMPLATE,
    },
    "named templates": {
        "tokenizer_config__json": {
            "bos_token": "<s>",
            "chat_template": [
                {"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}
            ],
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("frame", [None, "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("contents", FOLDERS.values(), ids=FOLDERS)
def test_tokens_and_template(tmp_path, contents, frame):
    folder = tmp_path / "hf"
    write_tokenizer(folder, ("</s>", "<s>"), frame)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    config |= contents["tokenizer_config__json"]
    files(folder, **{**contents, "tokenizer_config__json": config})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = JsonTokenizer((folder / "tokenizer.json").read_text(), "x")
    read = prompts.read_prompt_files(folder)
    prompts.check_tokens(read, ours)
    for text in TEXTS[1:]:
        assert prompts.encode_prompt(read, text, ours) == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))
    want = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert render_chat(read, TALK) == want
    assert {k: v for k, v in read.special.items() if v} == theirs.special_tokens_map


@pytest.mark.parametrize(
    "generation",
    [{}, {"do_sample": True}, {"do_sample": True, "top_p": 0.5, "temperature": 0.3}, {"top_k": 3}],
)
def test_sampling(tmp_path, generation):
    """The values with which `generate` runs; greedy is temperature 0."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**BASE["llama"], **GQA))
    model.generation_config = transformers.GenerationConfig(**generation, eos_token_id=[1, 2])
    got, _ = model._prepare_generation_config(None)
    given = dict.fromkeys(prompts.DEFAULTS)
    want = prompts.sampling_options(given, {**generation, "eos_token_id": [1, 2]}, 101)
    assert want["top_k"] == got.top_k and want["top_p"] == got.top_p
    assert want["temperature"] == (got.temperature if got.do_sample else 0)


def test_every_option_of_generation_is_known():
    known = prompts.GENERATION_VALUES.keys() | prompts.GENERATION_NEUTRAL
    known |= prompts.GENERATION_HARMLESS | set(prompts.GENERATION_UNUSED)
    options = {k for k in vars(transformers.GenerationConfig()) if not k.startswith("_")}
    # These are refused whatever their value is.
    refused = {
        "bad_words_ids", "begin_suppress_tokens", "constraints", "dola_layers",
        "exponential_decay_length_penalty", "force_words_ids", "forced_bos_token_id",
        "forced_eos_token_id", "sequence_bias", "suppress_tokens", "top_h", "watermarking_config",
    }  # fmt: skip
    assert options - known == refused
    defaults = transformers.GenerationConfig._get_default_generation_params()
    for key, value in prompts.GENERATION_NEUTRAL.items():
        assert defaults.get(key, value) == value


def test_ends(tmp_path):
    """The model's text stops where theirs does, at any of two end tokens."""
    case = Case("llama", "x", {**GQA, "vocab_size": 260, "eos_token_id": 257})
    model = oracle.build(case)
    folder = tmp_path / "hf"
    write_tokenizer(folder, ("<|endoftext|>", "<|im_end|>", "<x>", "<y>"))
    oracle.save(model, case, folder)
    files(folder, tokenizer_config__json={"eos_token": "<|im_end|>"})
    files(folder, generation_config__json={"eos_token_id": [257, 30, 40, 50, 60, 70, 80, 90, 100]})
    convert.import_run(folder, tmp_path / "run")
    writer = Writer(tmp_path / "run", max_new=40, temperature=0.0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, **oracle.EAGER)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    stopped = 0
    for text in ("ab", "b", "hello", "1", "z", "Q", "!", "x y"):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        out = theirs.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=259)[
            0, ids.shape[1] :
        ]
        stopped += len(out) < 40
        ends = [257, 30, 40, 50, 60, 70, 80, 90, 100]
        written = [i for i in out.tolist() if i not in ends]
        want = tokenizer.decode(written, skip_special_tokens=True)
        assert writer.write_each([text]) == [want]
    assert stopped >= 3


@pytest.mark.parametrize("kind", ["byte", "file"])
def test_a_run_trained_here_is_the_same_there_and_after_another_import(tmp_path, kind):
    """Ids, greedy text, dtype (mixed: bfloat16 among float32), and how text is written."""
    write_tokenizer(tmp_path / "t", (SEPARATOR, PADDING), f"$A {SEPARATOR}")
    tokenizer = (
        ByteTokenizer()
        if kind == "byte"
        else JsonTokenizer((tmp_path / "t/tokenizer.json").read_text(), "x")
    )
    path = kind if kind == "byte" else str(tmp_path / "t")
    cfg = ModelConfig(
        vocab_size=260, d_model=32, num_layers=2, num_dense_layers=0, max_seq_len=64, init_std=0.3,
        moe=MoEConfig(
            num_experts=4, experts_per_token=2, d_expert=16,
            router=router_options(normalize_weights=True),
        ),
    )  # fmt: skip
    experiment = ExperimentConfig(model=cfg, data=DataConfig(tokenizer=path, seq_len=64))
    params = init_params(transformer.param_specs(cfg), jax.random.key(0))
    params["head"] = params["head"].astype(jax.numpy.bfloat16)
    run = tmp_path / "run"
    checkpoints = Checkpoints(run, experiment)
    checkpoints.save_model(params, transformer.init_router_state(cfg))
    checkpoints.close()
    claim_workdir(run, experiment, tokenizer)
    convert.export_run(run, tmp_path / "hf", "mixtral")
    convert.import_run(tmp_path / "hf", tmp_path / "again")
    options = {"max_new": 20, "temperature": 0.0}
    here, again = Writer(run, **options), Writer(tmp_path / "again", **options)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **oracle.EAGER)
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert model.dtype == torch.float32  # holds both
    np.testing.assert_array_equal(
        model.lm_head.weight.detach().numpy(), np.asarray(params["head"], np.float32).T
    )
    assert again.run.params["head"].dtype == jax.numpy.bfloat16
    for text in TEXTS:
        ids = here.encode(text)
        assert ids == again.encode(text) == there(text)["input_ids"]
        (want,) = here.write_each([text])
        assert again.write_each([text]) == [want]
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=20, do_sample=False, tokenizer=there
        )
        assert there.decode(out[0, len(ids) :], skip_special_tokens=True) == want
    sampled, _ = model._prepare_generation_config(None)
    both = [
        prompts.sampling_options(dict.fromkeys(prompts.DEFAULTS), w.files.generation, 260)
        for w in (here, again)
    ]
    assert both[0] == both[1] == {k: getattr(sampled, k) for k in prompts.DEFAULTS}
    assert sampled.do_sample and sampled.max_new_tokens == prompts.MAX_NEW

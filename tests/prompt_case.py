"""Files that say how prompts are made, and a tokenizer that fits them."""

import json

import tokenizers

from moejax.data.tokenizer import JsonTokenizer
from moejax.interop.prompts import read_prompt_files
from moejax.runs.folder import HF


def write(tmp_path, **files):
    """The prompt files in the run's folder `tmp_path`, written as `name__suffix=text or JSON`."""
    folder = tmp_path / HF
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return read_prompt_files(folder)


def with_template(tmp_path, template):
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}}
    return write(tmp_path, tokenizer_config__json={**tokens, "chat_template": template})


def tokenizer() -> JsonTokenizer:
    """Seven words; every text is framed by <s>."""
    words = {
        w: i
        for i, w in enumerate(["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "Hello", "a"])
    }
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    described = json.loads(made.to_str())
    described["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    made = JsonTokenizer(json.dumps(described), "test")
    made.text = json.dumps(described)
    return made

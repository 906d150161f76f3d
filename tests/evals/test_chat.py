"""Prompts of imported checkpoints: templates (hostile ones too), special tokens, defaults."""

import json

import jax
import prompt_case
import pytest
from prompt_case import with_template, write

from moejax.__main__ import main
from moejax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
)
from moejax.evals import chat
from moejax.models import transformer
from moejax.params import init_params
from moejax.runs import folder as run_folder
from moejax.runs.checkpoint import Checkpoints

# The form of published templates: special tokens, roles, trimmed blocks, errors of their own.
TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
{{- message.content + '\\n' }}
    {%- elif message['role'] == 'user' %}
{{- '<|user|>' + message['content'].strip() }}
    {%- elif message['role'] == 'assistant' %}
{{- '<|assistant|>' + message['content'] + eos_token }}
    {%- else %}
{{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
HELLO = [{"role": "user", "content": " Hello <|user|>"}]


@pytest.fixture(scope="module")
def tokenizer():
    return prompt_case.tokenizer()


def test_conversation_is_rendered_and_its_special_tokens_recognised(tmp_path, tokenizer):
    files = with_template(tmp_path, TEMPLATE)
    talk = [
        {"role": "system", "content": "a"},
        *HELLO,
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "a"},
    ]
    text = "<s>a\n<|user|>Hello <|user|><|assistant|>Hello</s><|user|>a<|assistant|>"
    assert chat.render_chat(files, talk) == text
    assert chat.encode_chat(files, talk, tokenizer) == [1, 6, 3, 5, 3, 4, 5, 2, 3, 6, 4]


def test_the_file_goes_before_the_config_and_default_before_the_others(tmp_path):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    assert chat.render_chat(with_template(tmp_path, named), HELLO) == "plain"
    files = write(tmp_path, chat_template__jinja="{{ messages | tojson }} <é>")
    assert chat.render_chat(files, [{"role": "user", "content": "<é>"}]) == (
        '[{"role": "user", "content": "<é>"}] <é>'
    )


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        # Ways out of the sandbox.
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ raise_exception.__globals__['sys'].exit(0) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ messages.append(1) }}", "SecurityError"),
        # Ways to take everything.
        ("{{ 'a' * 10 ** 11 }}", "MemoryError"),
        ("{{ '%99999999999d' % 1 }}", "Error"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ 'a' * 10 ** 8 }}", "writes more than 1,000,0"),
        ("{% for i in range(9999) %}{{ 'a' * 999 }}{% endfor %}", "writes more than 1,000,0"),
        # Ways to the terminal.
        (
            "{{ raise_exception('\x1b[2J' + 'a' * 10 ** 7) }}",
            r"TemplateError: \\x1b\[2Ja{900,990}$",
        ),
    ],
)
def test_hostile_templates_are_answered(tmp_path, template, message):
    with pytest.raises(ConfigError, match=message):
        chat.render_chat(with_template(tmp_path, template), HELLO)


def test_a_template_without_end_is_ended(tmp_path, monkeypatch):
    """Ten thousand million turns without output: only a limit on the process ends it."""
    monkeypatch.setattr(chat, "SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(ConfigError, match=r"took more than 1 seconds|did not end in 2"):
        chat.render_chat(with_template(tmp_path, loop), HELLO)


def test_what_is_marked_for_training_is_rendered(tmp_path):
    """As in `transformers`, variables that are set within stay there."""
    marked = "{% generation %}{% set x = 1 %}!{% endgeneration %}{{ x }}"
    template = "{% for m in messages %}{{ m.content }}" + marked + "{% endfor %}"
    assert chat.render_chat(with_template(tmp_path, template), HELLO) == " Hello <|user|>!"


def test_a_template_sees_the_tokens_of_special_tokens_map(tmp_path):
    files = write(
        tmp_path,
        tokenizer_config__json={
            "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ pad_token }}"
        },
        special_tokens_map__json={"bos_token": "<s>", "eos_token": {"content": "</s>"}},
    )
    assert chat.render_chat(files, [{"role": "user", "content": "ab"}]) == "<s>ab"


def test_a_template_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"no chat template: neither .*chat_template\.jinja"):
        chat.render_chat(write(tmp_path), HELLO)


def test_messages_are_checked():
    assert chat.check_messages(HELLO, "x") == HELLO
    for bad in ([], {}, [1], [{"role": "user"}], [{"role": "user", "content": 1}]):
        with pytest.raises(ConfigError, match="x must be a list like"):
            chat.check_messages(bad, "x")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    """A model with random weights in the folder of an import, with the files of a chat model."""
    workdir = tmp_path_factory.mktemp("chat")
    source = workdir / "source.json"
    source.write_text(tokenizer.text)
    model = ModelConfig(
        vocab_size=8,  # wider than the tokenizer
        d_model=8,
        num_layers=1,
        num_dense_layers=0,
        max_seq_len=64,
        init_std=0.3,
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=8),
        moe=MoEConfig(num_experts=2, experts_per_token=1, d_expert=4),
    )
    cfg = ExperimentConfig(
        model=model,
        data=DataConfig(tokenizer=str(source), seq_len=16),
        mesh=MeshConfig(data=1),
    )
    run_folder.claim_workdir(workdir, cfg)
    checkpoints = Checkpoints(workdir, cfg)
    checkpoints.save_model(
        init_params(transformer.param_specs(model), jax.random.key(0)),
        transformer.init_router_state(model),
    )
    checkpoints.close()
    with_template(workdir, TEMPLATE)
    write(workdir, generation_config__json={"eos_token_id": [2], "max_new_tokens": 6})
    return workdir


def test_chat_command(run, tmp_path, capsys, monkeypatch):
    """A message, a file of messages and a conversation at the terminal; greedy with 6 tokens, as
    generation_config.json says."""

    def answer(*flags):
        assert main(["generate", f"--workdir={run}", "--chat", *flags]) == 0
        return capsys.readouterr().out

    first = answer("--prompt=Hello")
    assert first == answer("--prompt=Hello", "--greedy", "--max_new=6")
    assert len(first.split()) <= 6
    file = tmp_path / "messages.json"
    file.write_text(json.dumps([{"role": "user", "content": "Hello"}]))
    assert answer(f"--messages={file}") == first
    row = json.loads(answer("--prompt=Hello", "--jsonl"))
    assert row["messages"] == [{"role": "user", "content": "Hello"}]
    assert row["text"] == first.removesuffix("\n")

    asked = iter(["Hello", "a"])

    def say(prompt):
        for text in asked:
            return text
        raise EOFError

    monkeypatch.setattr("builtins.input", say)
    talk = answer()
    assert talk.startswith(first) and talk != first

"""Every option of moejax, once: frozen dataclasses with their meaning and defaults.

`experiments/*.py` hold `get_config() -> ConfigDict` made by `to_config_dict`; flags override single
values (`--config.model.moe.num_experts=32`); `from_config_dict` turns the ConfigDict into these frozen
dataclasses once, at the boundary, and reports *every* problem it finds with the offending keys and what
would work. Inside the library nothing but the frozen dataclasses is seen; they are hashable and static
under `jit`. Differences between published models are values of these fields, never code.
"""

import dataclasses
import difflib
import json
import sys
import typing
from typing import Any

from ml_collections import ConfigDict

from moejax.config_checks import experiment_problems, model_problems
from moejax.param_groups import Treatment, treatments
from moejax.text import MOST_MESSAGE, cut, plain


class ConfigError(ValueError):
    """A config that cannot work; the message names the keys and what would work.

    A message may quote files and flags: it is made safe to print, and short.
    """

    def __init__(self, message: str):
        super().__init__(plain(cut(message, MOST_MESSAGE)))


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (2104.09864) with YaRN context extension (2309.00071)."""

    theta: float = 10_000.0
    # True: rotate adjacent pairs (x0,x1),(x2,x3) (DeepSeek MLA); False: split halves (LLaMA).
    interleaved: bool = False
    # Context extension factor; 1 = plain RoPE.
    yarn_factor: float = 1.0
    yarn_original_len: int = 4096
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    # cos/sin are multiplied by m(mscale)/m(mscale_all_dim), the softmax scale by m(mscale_all_dim)^2,
    # with m(a) = 0.1 a ln(factor) + 1.
    yarn_mscale: float = 1.0
    yarn_mscale_all_dim: float = 0.0
    # Round the correction range to whole dimensions (gpt-oss does not).
    yarn_truncate: bool = True


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Multi-head and grouped-query attention ('mha'), or multi-head latent attention ('mla')."""

    kind: str = "mha"
    num_heads: int = 4
    # Equal to num_heads: MHA; smaller: GQA. Unused by 'mla'.
    num_kv_heads: int = 4
    head_dim: int = 32
    qkv_bias: bool = False
    out_bias: bool = False
    # RMSNorm on queries and keys: 'none', 'head' (each head, Qwen3), 'full' (before the split, OLMoE).
    qk_norm: str = "none"
    # A learned logit per head in the softmax denominator (gpt-oss).
    sinks: bool = False
    # Sliding windows, repeated over the layers; 0 = full attention. gpt-oss: (128, 0).
    windows: tuple[int, ...] = ()
    # MLA (2405.04434 section 2.1): widths of the latents and of the per-head parts.
    q_lora_rank: int = 0  # 0: full-rank queries (V2-Lite, Moonlight)
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    rope: RopeConfig = RopeConfig()

    @property
    def qk_head_dim(self) -> int:
        """Width of a query (and key) head."""
        if self.kind == "mla":
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.v_head_dim if self.kind == "mla" else self.head_dim

    def window(self, layer: int) -> int:
        """Sliding window of a layer; 0 = full attention."""
        return self.windows[layer % len(self.windows)] if self.windows else 0


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The Mixture-of-Experts layer. `num_experts=0` makes every layer dense."""

    num_experts: int = 0  # routed experts E
    experts_per_token: int = 2  # K
    d_expert: int = 0  # FFN width F of a routed expert
    shared_experts: int = 0  # experts every token uses (computed as one FFN)
    d_shared: int = 0  # total width of the shared FFN; 0: shared_experts * d_expert
    shared_gate: bool = False  # multiply the shared FFN by sigmoid(w x) (Qwen2-MoE)

    router: str = "token_choice"  # a key of moejax.moe.routers.ROUTERS
    score: str = "softmax"  # 'softmax' (v1, V2), 'sigmoid' (V3), 'sqrt_softplus' (V4)
    normalize_weights: bool = False  # divide the K chosen weights by their sum
    routed_scaling: float = 1.0  # multiply the weights (V3: 2.5)
    router_bias: bool = False  # learned bias on the router logits (gpt-oss)
    # Group-limited selection: keep topk_groups of num_groups, judged by their 'max' member (V2) or the
    # 'top2_sum' of their biased scores (V3). num_groups = 1: no limit.
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    # Selection bias learned by rule, not by gradient (2408.15664): 'none', 'sign' (V3),
    # 'sign_centered' (Moonlight), 'proportional'. 'frozen' keeps a loaded bias as it is.
    bias_update: str = "none"
    bias_rate: float = 0.001

    # Balance losses: coefficients; 0 = off. See moejax.moe.balance for the equations.
    expert_loss: float = 0.0  # v1 expert-level, f pooled over the global batch
    sequence_loss: float = 0.0  # V3 sequence-wise (with normalised scores)
    device_loss: float = 0.0  # v1/V2 device-level over balance_groups groups
    communication_loss: float = 0.0  # V2 communication balance over balance_groups groups
    z_loss: float = 0.0  # router z-loss (ST-MoE)
    balance_groups: int = 1  # D, devices the device-level losses think of

    activation: str = "swiglu"  # of routed and shared experts; see moejax.moe.experts.ACTIVATIONS
    activation_limit: float = 0.0  # clamp of the clamped activations (gpt-oss 7, V4 10)
    ffn_bias: bool = False  # biases in the experts (gpt-oss)

    # 'dense' (oracle), 'dropless', or 'capacity': drops in training, counted; later tokens (and those of
    # other sequences) may take a slot, and each micro-batch has its own.
    dispatcher: str = "dropless"
    capacity_factor: float = 1.25  # 'capacity': slots per expert = ceil(factor * T * K / E)
    grouped_matmul: str = "auto"  # 'auto' (by platform) or a key of moejax.moe.grouped_matmul
    # With an expert mesh axis > 1: 'ring' (all-gather, reduce-scatter) or 'all_to_all'.
    expert_parallel: str = "ring"
    # Rows a device computes ('ring') or receives from each peer ('all_to_all'), as a multiple of the
    # balanced load; what overflows is dropped and counted. 0 = the worst case: nothing overflows.
    buffer_factor: float = 0.0

    @property
    def shared_width(self) -> int:
        return self.d_shared or self.shared_experts * self.d_expert


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder-only transformer."""

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    num_dense_layers: int = (
        1  # leading layers with a dense FFN; the rest are MoE if num_experts > 0
    )
    d_ff: int = 512  # width of a dense FFN
    activation: str = "swiglu"  # of dense FFNs; 'gelu_tanh' for GPT-2
    ffn_bias: bool = False
    norm: str = "rmsnorm"  # or 'layernorm' (GPT-2)
    norm_eps: float = 1e-6
    positions: str = "rope"  # or 'learned' (GPT-2)
    tie_embeddings: bool = False
    max_seq_len: int = 4096
    init_std: float = 0.006  # DeepSeek's
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    # Multi-token prediction (2412.19437 section 2.2): extra depths, and the weight of their loss.
    mtp_depth: int = 0
    mtp_loss_weight: float = 0.3

    # How it is computed; none of these changes a result beyond rounding.
    dtype: str = "float32"  # compute dtype; master weights and router are float32
    scan_layers: bool = True  # False: unrolled
    remat: str = "none"  # 'none', 'full' (save layer inputs), 'dots' (save matmul results)
    loss_chunk: int = 0  # cross-entropy over this many tokens at a time; 0: chosen by vocabulary

    @property
    def tokens_of_logits(self) -> int:
        """Tokens whose logits exist at once in the loss: `loss_chunk`, or as many as give 2^25 logits."""
        return self.loss_chunk or max(1, 2**25 // self.vocab_size)

    @property
    def without_drops(self) -> "ModelConfig":
        """The same model, as it is evaluated and generates: no token competes with others for a slot."""
        if self.moe.dispatcher != "capacity" or self.moe.router == "expert_choice":
            return self
        return dataclasses.replace(self, moe=dataclasses.replace(self.moe, dispatcher="dropless"))

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers if self.moe.num_experts else 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    # Each source is 'domain=where': 'builtin' (the embedded corpus, three domains), 'code=src/**/*.py'
    # (a glob of text), 'wiki=dump/*.jsonl.zst' (JSON lines, also .gz, .bz2, .xz), 'web=part-*.parquet',
    # 'stories=hf:org/name' (Hugging Face datasets, an extra).
    sources: tuple[str, ...] = ("builtin",)
    # Sampling weight of each source; () = by size.
    weights: tuple[float, ...] = ()
    text_field: str = "text"  # field of JSONL, Parquet and Hugging Face records
    skip_bad_records: bool = False  # leave out and count records without text, instead of an error
    max_bytes: int = 0  # read at most this much of each domain; 0 = all
    tokenizer: str = (
        "bpe"  # 'byte', 'bpe' (trained on the corpus, saved with the run), or a tokenizer.json
    )
    vocab_size: int = 4096  # of the trained BPE
    seq_len: int = 256
    batch_size: int = 16  # sequences per optimiser step, over all devices
    validation_fraction: float = 0.02  # of the documents of every domain
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters learn. Matrices, embeddings and head decay; norms, biases and sinks do not."""

    # A key of moejax.train.optimizer.OPTIMIZERS: 'adamw', 'muon', 'adafactor', 'lion'. An option that it
    # does not read must keep its default: docs/optimizers.md.
    name: str = "adamw"
    learning_rate: float = 1e-3
    # 'multistep' (DeepSeekMoE: x decay_factor at each fraction in decay_at), 'cosine',
    # 'wsd' (warm-up, stable, linear decay from decay_at[0]), 'constant'.
    schedule: str = "multistep"
    warmup_steps: int = 100
    decay_at: tuple[float, ...] = (0.8, 0.9)
    decay_factor: float = 0.316
    min_lr_ratio: float = 0.1  # end of 'cosine' and 'wsd'
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # of the global gradient; 0 = off
    # Muon: decay of its momentum; in [0, 1).
    momentum: float = 0.95
    # Muon: rows (times, a, b, c) of iterations X -> a X + (b A + c A^2) X, A = X X^T, in this order.
    newton_schulz: tuple[tuple[float, ...], ...] = ((5, 3.4445, -4.775, 2.0315),)
    # Muon: root mean square of an update before the learning rate, 0.2 is AdamW's (2502.16982); at least 0.
    # 0: sqrt(max(1, out / in)) times an orthogonal matrix instead.
    consistent_rms: float = 0.0
    # Muon: the roles that it takes, 'matrix' and of 'router', 'embedding', 'head' any; AdamW takes the rest.
    muon_roles: tuple[str, ...] = ("matrix",)
    # Rules for some of the parameters, such as 'role=embedding lr=0.1' or 'path=*/router/* frozen': see
    # moejax.param_groups. The last one that matches wins.
    groups: tuple[str, ...] = ()

    def treatments(self, roles: dict[str, str]) -> dict[str, Treatment]:
        """How each parameter is trained (path -> Treatment), of path -> role. ConfigError if a group does not
        fit them."""
        try:
            return treatments(self.groups, roles)
        except ValueError as e:
            raise ConfigError(f"optimizer.groups: {e}") from e


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    steps: int = 300
    accumulation: int = 1  # micro-batches per optimiser step; results do not depend on it
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep_last: int = 2
    keep_every: int = 0  # also keep every n-th step for good; 0 = none
    max_bad_steps: int = 10  # stop after this many NaN/infinite steps in a row
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one of them may be -1 (all that are left)."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    # Rows that replace the table in moejax.sharding: 'logical=mesh', 'logical=mesh+mesh', 'logical='.
    rules: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    name: str = "base"
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()


# ---------------------------------------------------------------------------------------------------
# Between ConfigDict, JSON and the dataclasses.


def to_config_dict(cfg: Any) -> ConfigDict:
    """A ConfigDict with the same fields; tuples stay tuples, nesting stays nesting."""

    def plain(c):
        return {
            f.name: plain(v) if dataclasses.is_dataclass(v := getattr(c, f.name)) else v
            for f in dataclasses.fields(c)
        }

    return ConfigDict(plain(cfg)).lock()


def to_json(cfg: Any) -> str:
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def from_config_dict(values: Any, cls: type = ExperimentConfig, *, check: bool = True) -> Any:
    """Frozen dataclasses from a ConfigDict or dict; raises ConfigError naming every problem at once."""
    problems: list[str] = []
    cfg = _build(cls, values, "", problems)
    if not problems and check and cls in (ExperimentConfig, ModelConfig):
        model = cfg.model if cls is ExperimentConfig else cfg
        problems += model_problems(model, "model." if cls is ExperimentConfig else "")
        if cls is ExperimentConfig:
            problems += experiment_problems(cfg)
    if problems:
        raise ConfigError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)} in the config:\n"
            + "\n".join(f"  - {p}" for p in problems)
        )
    return cfg


def _build(cls, values, prefix, problems):
    values = values.to_dict() if isinstance(values, ConfigDict) else dict(values)
    types = typing.get_type_hints(cls)
    kwargs = {}
    for key, value in values.items():
        if key not in types:
            near = difflib.get_close_matches(str(key), types, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(types)}"
            problems.append(f"unknown key {prefix}{key}; {hint}")
        elif dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict | ConfigDict):
                problems.append(f"{prefix}{key} must be a group of options, not {value!r}")
            else:
                kwargs[key] = _build(types[key], value, f"{prefix}{key}.", problems)
        else:
            try:
                kwargs[key] = _coerce(value, types[key])
            except TypeError as e:
                n = "n" * str(e).startswith("int")
                problems.append(f"{prefix}{key} must be a{n} {e}, not {value!r}")
    return cls(**kwargs)


def _coerce(value, want):
    """`value` as type `want`: exact types, int for float, list for tuple; never str for a number, and
    no float that is not finite. The TypeError says what is wanted."""
    if typing.get_origin(want) is tuple:
        item = typing.get_args(want)[0]
        if not isinstance(value, list | tuple):
            raise TypeError(f"tuple of {item.__name__}s")
        try:
            return tuple(_coerce(v, item) for v in value)
        except TypeError as e:
            raise TypeError(f"tuple of {e}s") from None
    fits = isinstance(value, int | float if want is float else want)
    if not fits or (isinstance(value, bool) and want is not bool):
        raise TypeError(want.__name__)
    if want is float and not abs(value) <= sys.float_info.max:  # false for NaN, too
        raise TypeError("finite float")
    return want(value)

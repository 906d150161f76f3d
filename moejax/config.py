"""Every option of moejax, once: frozen dataclasses with meaning, default and range beside each field.

Groups by meaning: `model` is the function, `objective` what it is trained for besides the text, `compute` how
it is computed; `data`, `optimizer`, `train` and `mesh` are the rest of an experiment. A router's own options
lie with the router and are the group `model.moe.router`. Inside the library nothing but these dataclasses is
seen; they are hashable and static under `jit`. Differences between published models are values of these
fields, never code. `moejax.config_io` reads and writes them, `moejax.config_checks` says what does not fit
together.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

from moejax.options import ConfigError as ConfigError  # where the rest of the library takes it from
from moejax.options import choice, number
from moejax.param_groups import Treatment, treatments
from moejax.routers import router_of, router_options
from moejax.routers.balance import BalanceConfig
from moejax.routers.contract import Router, RouterConfig, RouterOptions


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary positions (2104.09864) with YaRN context extension (2309.00071)."""

    theta: float = number(10_000.0, above=1)
    # True: rotate adjacent pairs (x0,x1),(x2,x3) (DeepSeek MLA); False: split halves (LLaMA).
    interleaved: bool = False
    # Channels of a head that are rotated, its first ones; 0: all (GLM-4.5 64 of 128).
    width: int = number(0, least=0)
    # Context extension factor; 1 = plain RoPE.
    yarn_factor: float = number(1.0, least=1)
    yarn_original_len: int = number(4096, least=1)
    yarn_beta_fast: float = number(32.0, above=0)
    yarn_beta_slow: float = number(1.0, above=0)
    # cos/sin are multiplied by m(mscale)/m(mscale_all_dim), the softmax scale by m(mscale_all_dim)^2,
    # with m(a) = 0.1 a ln(factor) + 1.
    yarn_mscale: float = number(1.0, least=0)
    yarn_mscale_all_dim: float = number(0.0, least=0)
    # Round the correction range to whole dimensions (gpt-oss does not).
    yarn_truncate: bool = True
    # The ramp from slowed to kept frequencies rises with the dimension (YaRN's code), or with the turns within
    # the original length. The latter, with mscale 0, is LLaMA 3's scaling (2407.21783 section 3.4).
    yarn_ramp: str = choice("dimension", "turns")


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Multi-head and grouped-query attention ('mha'), the same with other key heads in layers with a window
    ('hybrid'), multi-head latent attention ('mla'), the latter among keys that an indexer chooses ('dsa'), and
    among compressed ones (DeepSeek-V4's 'compressed')."""

    kind: str = choice("mha", "mla", "dsa", "compressed", "hybrid")
    num_heads: int = number(4, least=1)
    # Equal to num_heads: MHA; smaller: GQA. Unused by 'mla'.
    num_kv_heads: int = 4
    head_dim: int = 32
    qkv_bias: bool = False
    out_bias: bool = False
    # RMSNorm on queries and keys: of each head (Qwen3), before the split (OLMoE), or of each head after the
    # rotation (Hunyuan).
    qk_norm: str = choice("none", "head", "full", "head_rotated")
    scale: float = number(
        0.0, least=0
    )  # of q k before the softmax (Granite); 0: 1 / sqrt(head width)
    # A learned logit per head in the softmax denominator (gpt-oss).
    sinks: bool = False
    # Sliding windows, repeated over the layers; 0 = full attention. gpt-oss: (128, 0).
    windows: tuple[int, ...] = ()
    # The layers with rotary positions: 'windowed': those with a window, the others have none (EXAONE).
    rope_layers: str = choice("all", "windowed")
    # 'hybrid': key heads, and the base of the rotation (0: rope.theta), of layers with a window; and what
    # values are multiplied by. Sinks are in those layers alone, values are v_head_dim wide.
    window_kv_heads: int = 0
    window_theta: float = number(0.0, least=0)
    value_scale: float = number(1.0, above=0)
    # MLA (2405.04434 section 2.1): widths of the latents and of the per-head parts.
    q_lora_rank: int = number(0, least=0)  # 0: full-rank queries (V2-Lite, Moonlight)
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0  # 'hybrid' too
    # The indexer ('dsa', 2512.02556 section 2.1, and 'compressed'): its heads, their width (the first
    # qk_rope_head_dim channels are rotated, in pairs or in halves; 'compressed': the last, in pairs), and the
    # keys that it chooses for a query.
    index_heads: int = number(0, least=0)
    index_head_dim: int = number(0, least=0)
    index_topk: int = number(0, least=0)
    index_interleaved: bool = False  # GLM-5
    # Layers without an indexer, which take what the layer before chose (2603.12201).
    index_shared_at: tuple[int, ...] = ()
    # A window beside compressed keys ('compressed', DeepSeek-V4): see moejax.attention.compressed.
    layer_kinds: tuple[str, ...] = ()  # of each layer: 'sliding', 'csa' or 'hca'
    sliding_window: int = number(0, least=0)  # tokens that every layer sees
    csa_rate: int = number(4, least=1)  # tokens of an entry
    hca_rate: int = number(128, least=1)
    compress_theta: float = number(
        160_000.0, above=1
    )  # of layers with entries; they alone have YaRN
    o_groups: int = number(0, least=0)  # groups of heads with outputs of their own
    o_lora_rank: int = number(0, least=0)  # outputs of a group
    rope: RopeConfig = RopeConfig()

    def window(self, layer: int) -> int:
        """Sliding window of a layer; 0 = full attention."""
        return self.windows[layer % len(self.windows)] if self.windows else 0


ACTIVATIONS = ("swiglu", "swiglu_clamped", "swiglu_oai", "gelu_tanh")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The Mixture-of-Experts layer. `num_experts=0` makes every layer dense."""

    num_experts: int = number(0, least=0)  # routed experts E
    experts_per_token: int = 2  # K; a router may use fewer, or other numbers on average
    d_expert: int = 0  # FFN width F of a routed expert
    shared_experts: int = number(0, least=0)  # experts every token uses (computed as one FFN)
    d_shared: int = number(0, least=0)  # width of the shared FFN; 0: shared_experts * d_expert
    shared_gate: bool = False  # multiply the shared FFN by sigmoid(w x) (Qwen2-MoE)
    # The router: `name`, a key of moejax.routers.ROUTERS, and the options that this router has.
    router: RouterOptions = router_options()  # noqa: RUF009 (frozen)
    activation: str = choice(*ACTIVATIONS)  # of routed and shared experts; see moejax.moe.experts
    activation_limit: float = number(0.0, least=0)  # of the clamped activations (gpt-oss 7, V4 10)
    ffn_bias: bool = False  # biases in the experts (gpt-oss)
    # LatentMoE (2601.18089): routed experts work on W_down x, this wide, and W_up takes their sum back; router
    # and shared experts see x. 0: experts see x.
    latent_dim: int = number(0, least=0)

    def expert_input(self, d_model: int) -> int:
        """Width of what a routed expert reads and writes."""
        return self.latent_dim or d_model

    @property
    def shared_width(self) -> int:
        return self.d_shared or self.shared_experts * self.d_expert


@dataclasses.dataclass(frozen=True)
class StreamsConfig:
    """The residual as several streams, mixed by hyper-connections (mHC, 2512.24880; DeepSeek-V4)."""

    count: int = number(1, least=1)  # 1: the ordinary residual, without parameters
    sinkhorn_steps: int = number(20, least=1)  # that make the mixing matrices doubly stochastic
    eps: float = number(1e-6, above=0)  # added to weights, and to sums that are divided by


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder-only transformer: which function it is."""

    vocab_size: int = number(0, least=0)  # rows for tokens; 0: as many as the tokenizer has
    d_model: int = number(128, least=1)
    num_layers: int = number(4, least=1)
    # Leading layers with a dense FFN; the rest are MoE if num_experts > 0.
    num_dense_layers: int = 1
    # Which layers these are, where they are not the first ones: their numbers from 0, in order.
    dense_at: tuple[int, ...] = ()
    d_ff: int = 512  # width of a dense FFN
    activation: str = choice(*ACTIVATIONS)  # of dense FFNs; 'gelu_tanh' for GPT-2
    ffn_bias: bool = False
    norm: str = choice("rmsnorm", "layernorm")  # 'layernorm' for GPT-2
    norm_eps: float = number(1e-6, above=0)
    positions: str = choice("rope", "learned")  # 'learned' for GPT-2
    tie_embeddings: bool = False
    max_seq_len: int = number(4096, least=1)
    # Deviation of fresh parameters (DeepSeek's): where training begins, not what the function is.
    init_std: float = number(0.006, above=0)
    attention: AttentionConfig = AttentionConfig()
    moe: MoEConfig = MoEConfig()
    streams: StreamsConfig = StreamsConfig()
    # Granite: factors of the embedded tokens and of what each sub-layer adds, and what logits are divided by.
    embedding_multiplier: float = number(1.0, above=0)
    residual_multiplier: float = number(1.0, above=0)
    logits_divisor: float = number(1.0, above=0)
    mtp_depth: int = number(0, least=0)  # depths of multi-token prediction (2412.19437 section 2.2)

    @property
    def num_moe_layers(self) -> int:
        return self.num_layers - self.num_dense_layers if self.moe.num_experts else 0

    @property
    def layers(self) -> dict[str, Sequence[int]]:
        """The layers of each stack of blocks, in order."""
        dense = self.num_layers - self.num_moe_layers
        if not self.dense_at:
            return {"dense_blocks": range(dense), "moe_blocks": range(dense, self.num_layers)}
        others = sorted({*range(self.num_layers)} - {*self.dense_at})
        return {"dense_blocks": self.dense_at, "moe_blocks": others}

    @property
    def router(self) -> Router | None:
        """The router of the MoE layers; None for a dense model."""
        return router_of(self.moe.router) if self.num_moe_layers else None

    def router_config(self, balance: BalanceConfig | None = None) -> RouterConfig:
        """What the router of this model sees. `balance`: in training."""
        return RouterConfig(
            options=self.moe.router,
            num_experts=self.moe.num_experts,
            experts_per_token=self.moe.experts_per_token,
            d_model=self.d_model,
            vocab_size=self.vocab_size,
            num_layers=self.num_moe_layers,
            shared_experts=self.moe.shared_experts,
            init_std=self.init_std,
            balance=BalanceConfig() if balance is None else balance,
            training=balance is not None,
            max_seq_len=self.max_seq_len,
        )

    @property
    def routes_per_token(self) -> int:
        """The most routes that one token can have, special experts included; 0 for a dense model."""
        return self.router.routes_per_token(self.router_config()) if self.router else 0

    @property
    def experts_used(self) -> float:
        """Routed experts that compute for one token on average, by the router's own word."""
        return self.router.experts_used(self.router_config()) if self.router else 0.0


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig(BalanceConfig):
    """What a model is trained for besides the next token. Evaluation and generation know nothing of it."""

    mtp_loss_weight: float = number(0.3, least=0)  # lambda of 2412.19437 eq. 25
    # Weight of the loss by which indexers learn to rank keys as attention does, mean over layers that have one
    # (2512.02556 section 2.1.1); 0: they do not learn.
    index_loss: float = number(0.0, least=0)
    # Their warm-up: attention sees all keys, and they are to rank them all. Freeze the rest of the model with
    # optimizer.groups=('path=* frozen', 'path=*/indexer/* trained').
    index_dense: bool = False
    # Token choice in training: slots per expert = ceil(factor * T * K / E), and what finds none is dropped and
    # counted. Later tokens (and those of other sequences) may take a slot, each micro-batch has its own. 0: no
    # drops.
    capacity_factor: float = number(0.0, least=0)


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
    """How a model is computed; none of it changes a result beyond rounding, but for rows past
    `buffer_factor`."""

    # Compute dtype; master weights and router are float32.
    dtype: str = choice("float32", "bfloat16", "float64")
    # 'bfloat16': what routers read, hidden states and their own parameters, is rounded to it; they compute in
    # float32 all the same.
    router_dtype: str = choice("float32", "bfloat16")
    scan_layers: bool = True  # False: unrolled
    remat: str = choice("none", "full", "dots")  # 'full' saves layer inputs, 'dots' matmul results
    # Attention works on blocks of so many queries and keys; 0: on blocks of 256 from 513 queries on.
    attention_block: int = number(0, least=0)
    loss_chunk: int = number(0, least=0)  # tokens of logits at a time; 0: 2^25 / vocabulary
    # 'auto': by the form of the router; 'dense': every expert computes every token (the oracle).
    dispatcher: str = choice("auto", "dense")
    # 'auto' (by platform) or a key of moejax.moe.grouped_matmul.IMPLEMENTATIONS.
    grouped_matmul: str = choice("auto", "reference", "ragged", "tokamax")
    # With an expert mesh axis > 1: 'ring' (all-gather, reduce-scatter) or 'all_to_all'.
    expert_parallel: str = choice("ring", "all_to_all")
    # Rows a device computes ('ring') or receives from each peer ('all_to_all'), as a multiple of the
    # balanced load; what overflows is dropped and counted. 0 = the worst case: nothing overflows.
    buffer_factor: float = number(0.0, least=0)
    # Of these, the ones that are about the routes of tokens; routers that fill slots have none.
    FOR_ROUTES: ClassVar[tuple[str, ...]] = ("grouped_matmul", "expert_parallel", "buffer_factor")

    def tokens_of_logits(self, vocab_size: int) -> int:
        """Tokens whose logits exist at once in the loss: `loss_chunk`, or as many as give 2^25 logits."""
        return self.loss_chunk or max(1, 2**25 // vocab_size)


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
    max_bytes: int = number(0, least=0)  # read at most this much of each domain; 0 = all
    tokenizer: str = (
        "bpe"  # 'byte', 'bpe' (trained on the corpus, saved with the run), or a tokenizer.json
    )
    vocab_size: int = number(4096, least=1)  # of the trained BPE
    seq_len: int = number(256, least=1)
    batch_size: int = number(16, least=1)  # sequences per optimiser step, over all devices
    validation_fraction: float = number(0.02, above=0, below=1)  # of the documents of every domain
    seed: int = number(0, least=0)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters learn. Matrices, embeddings and head decay; norms, biases and sinks do not."""

    # A key of moejax.train.optimizer.OPTIMIZERS. An option that it does not read must keep its default:
    # docs/optimizers.md.
    name: str = choice("adamw", "muon", "adafactor", "lion")
    learning_rate: float = number(1e-3, above=0)
    # 'multistep' (DeepSeekMoE: x decay_factor at each fraction in decay_at), 'cosine',
    # 'wsd' (warm-up, stable, linear decay from decay_at[0]), 'constant'.
    schedule: str = choice("multistep", "cosine", "wsd", "constant")
    warmup_steps: int = number(100, least=0)
    decay_at: tuple[float, ...] = (0.8, 0.9)
    decay_factor: float = number(0.316, above=0)
    min_lr_ratio: float = number(0.1, least=0, most=1)  # end of 'cosine' and 'wsd'
    b1: float = number(0.9, least=0, below=1)
    b2: float = number(0.95, least=0, below=1)
    eps: float = number(1e-8, above=0)
    weight_decay: float = number(0.1, least=0)
    clip_norm: float = number(1.0, least=0)  # of the global gradient; 0 = off
    momentum: float = number(0.95, least=0, below=1)  # Muon: decay of its momentum
    # Muon: rows (times, a, b, c) of iterations X -> a X + (b A + c A^2) X, A = X X^T, in this order.
    newton_schulz: tuple[tuple[float, ...], ...] = ((5, 3.4445, -4.775, 2.0315),)
    # Muon: root mean square of an update before the learning rate, 0.2 is AdamW's (2502.16982).
    # 0: sqrt(max(1, out / in)) times an orthogonal matrix instead.
    consistent_rms: float = number(0.0, least=0)
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
    steps: int = number(300, least=1)
    # Begin with the weights, router state and tokenizer of this run, of one of its checkpoints
    # (RUN/checkpoints/STEP), or of a Hugging Face folder: docs/runs.md. '': begin from scratch.
    init_from: str = ""
    # The base is dense, and this a mixture whose experts begin as copies of its FFN (2212.05055).
    upcycle: bool = False
    accumulation: int = number(
        1, least=1
    )  # micro-batches per optimiser step; results do not depend on it
    log_every: int = number(10, least=1)
    eval_every: int = number(100, least=1)
    eval_batches: int = number(8, least=1)
    checkpoint_every: int = number(100, least=1)
    keep_last: int = number(2, least=1)
    keep_every: int = number(0, least=0)  # also keep every n-th step for good; 0 = none
    max_bad_steps: int = number(10, least=1)  # stop after this many NaN/infinite steps in a row
    rate_may_jump: bool = False  # go on with another schedule although the learning rate jumps
    seed: int = number(0, least=0)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one of them may be -1 (all that are left)."""

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    # Rows that replace the table in moejax.mesh: 'logical=mesh', 'logical=mesh+mesh', 'logical='.
    rules: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    name: str = "base"
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    compute: ComputeConfig = ComputeConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()

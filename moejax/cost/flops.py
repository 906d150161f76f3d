"""FLOPs per token from shapes; a multiply-add is 2.

Two conventions, because publications differ:
  exact            what the shapes say, `flops_per_token`.
  paper_2401_06066 the figures of the DeepSeekMoE paper, `paper_2401_06066`.
"""

import dataclasses

from moejax.config import ModelConfig
from moejax.cost.architecture import Architecture, Attention
from moejax.moe.experts import ACTIVATIONS

PHASES = ("train", "forward", "prefill", "decode")


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs per token; `attention` and `total` are None where unpublished."""

    matmul: float
    attention: float | None

    @property
    def total(self) -> float | None:
        return None if self.attention is None else self.matmul + self.attention


def mean_keys(seq_len: int, limit: int, causal: bool) -> float:
    """Keys a query sees, averaged over a sequence, when at most the last `limit` (0 = all) are
    seen.

    Causal attention counts S/2 of S keys (2505.09343 Table 2). Not causal: all S for every query,
    as in code that computes every score and masks half of them, windows included.
    """
    if not causal:
        return seq_len
    if not limit or limit >= seq_len:
        return seq_len / 2
    return limit - limit * limit / (2 * seq_len)


def _attention_macs(a: Attention, seq_len: int, causal: bool) -> float:
    """Multiply-adds per token of one layer, averaged over a sequence."""
    entries = seq_len // a.stride
    keys = mean_keys(entries, 0, causal)
    seen = mean_keys(entries, a.window or a.topk, causal)
    local = mean_keys(seq_len, a.local, causal) if a.local else 0
    return a.macs * (seen + local) + a.index_macs * keys


def _decode_macs(a: Attention, context: int) -> float:
    """Multiply-adds of one new token that sees `context` tokens."""
    keys = context // a.stride
    seen = min(keys, a.window or a.topk or keys)
    return a.decode_macs * (seen + min(context, a.local)) + a.index_macs * keys


def flops_per_token(
    arch: Architecture,
    phase: str,
    context: int,
    *,
    causal: bool = True,
    mtp: bool = False,
) -> Flops:
    """FLOPs per token of one phase.

    Args:
      arch: the model.
      phase: 'forward'; 'train', three times forward (recomputation not counted); 'prefill', forward
        without the head, which only a prompt's last token needs; 'decode', one token against a
        cache.
      context: sequence length, or tokens in the cache for 'decode'.
      causal: whether masked scores are left out.
      mtp: count the multi-token-prediction modules, each with its pass through the head.
    """
    if phase not in PHASES:
        raise ValueError(f"phase {phase!r}: expected one of {', '.join(PHASES)}")
    parts, attention = list(arch.parts), arch.attention
    head = arch.part("head")
    if phase == "prefill":
        parts = [p for p in parts if p.name != "head"]
    if mtp and arch.mtp:
        depths = arch.mtp_attention[0].layers
        parts += [*arch.mtp, *([head] * depths if head else [])]
        attention = None if attention is None else (*attention, *arch.mtp_attention)
    share = arch.prefill_share if phase == "prefill" else 1
    factor = share * (6 if phase == "train" else 2)
    matmul = factor * sum(p.active_matrix for p in parts)
    if attention is None:
        return Flops(matmul, None)
    if phase == "decode":
        macs = sum(a.layers * _decode_macs(a, context) for a in attention)
    else:
        macs = sum(a.layers * _attention_macs(a, context, causal) for a in attention)
    return Flops(matmul, factor * macs)


# --------------------------------------------------------------------------------------------------
# The convention of the DeepSeekMoE paper. The paper does not state it: this formula was inferred,
# and reproduces ten of the eleven figures of its Tables 1, 2, 3 and 6 to the printed digit.


def paper_2401_06066(
    num_layers: int, d_model: int, vocab_size: int, seq_len: int, ffn_params: float
) -> float:
    """Training FLOPs of one sequence in the convention of 2401.06066.

        S [ L (24 d^2 + 12 d S) + 6 P + 6 V d ]

    4 d^2 for attention's projections (with grouped queries too), attention not causal, the head but
    neither input embedding nor router, and `ffn_params` (P) FFN parameters used by a token over all
    layers, every layer an MoE layer.
    """
    attention = num_layers * (24 * d_model**2 + 12 * d_model * seq_len)
    return seq_len * (attention + 6 * ffn_params + 6 * vocab_size * d_model)


def _ffn(d_model: int, width: float, activation: str) -> float:
    """Scalars in the matrices of one FFN."""
    return (2 + ACTIVATIONS[activation].gated) * d_model * width


def ideal_ffns(cfg: ModelConfig) -> float | None:
    """FFNs a token uses per layer, in units of the paper's standard FFN of 8 d^2 parameters.

    Real widths are rounded (1408 for a quarter of 5461); the paper counts the ideal fraction. None
    where no fraction 1/m or multiple m is within 5% of the real width.
    """
    moe = cfg.moe if cfg.num_moe_layers else None
    if moe and moe.latent_dim:  # the paper has none
        return None
    width, activation = (moe.d_expert, moe.activation) if moe else (cfg.d_ff, cfg.activation)
    size = _ffn(cfg.d_model, width, activation) / (8 * cfg.d_model**2)
    ideal = 1 / round(1 / size) if size < 0.75 else float(round(size))
    if abs(size / ideal - 1) > 0.05:
        return None
    return ideal * (cfg.experts_used + moe.shared_width / moe.d_expert if moe else 1)


def paper_flops(cfg: ModelConfig, seq_len: int, *, ideal: bool = True) -> float | None:
    """`paper_2401_06066` of a config; None where its widths are not near an ideal fraction.

    `ideal=False` takes the expert's real width, which Table 6's 145B and 142B figures need.
    """
    if ideal:
        ffns = ideal_ffns(cfg)
        if ffns is None:
            return None
        per_layer = ffns * 8 * cfg.d_model**2
    else:
        m, moe = cfg.moe, cfg.num_moe_layers > 0
        width = cfg.experts_used * m.d_expert + m.shared_width if moe else cfg.d_ff
        activation = m.activation if moe else cfg.activation
        per_layer = _ffn(cfg.d_model, width, activation)
        if moe and m.latent_dim:
            routed = _ffn(m.latent_dim, cfg.experts_used * m.d_expert, activation)
            shared = _ffn(cfg.d_model, m.shared_width, activation)
            per_layer = routed + shared + 2 * cfg.d_model * m.latent_dim
    return paper_2401_06066(
        cfg.num_layers, cfg.d_model, cfg.vocab_size, seq_len, cfg.num_layers * per_layer
    )

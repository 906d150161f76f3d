"""The table of kinds of attention. Adding one is a file beside these and a line here."""

from collections.abc import Mapping

from moejax.attention import compressed, dsa, hybrid, mha, mla
from moejax.attention.contract import AttentionKind
from moejax.config import AttentionConfig

ATTENTIONS: Mapping[str, AttentionKind] = {
    "mha": mha.KIND,
    "mla": mla.KIND,
    "dsa": dsa.KIND,
    "compressed": compressed.KIND,
    "hybrid": hybrid.KIND,
}


def kind_of(a: AttentionConfig) -> AttentionKind:
    """The kind that these options name; `AttentionConfig.kind` has no other choices."""
    return ATTENTIONS[a.kind]

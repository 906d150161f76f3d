"""Parameter counts in the conventions publishers use."""

import dataclasses

from moejax.cost.architecture import Architecture

# What a token 'uses' depends on who counts.
CONVENTIONS = {
    "with embeddings": (),
    "without input embedding": ("embedding",),  # a lookup costs no FLOPs
    "without embeddings": ("embedding", "head"),
}


@dataclasses.dataclass(frozen=True)
class Count:
    """Parameters of a model under one convention."""

    total: int
    active: int


def counts(arch: Architecture) -> dict[str, Count]:
    """Total and active parameters under each of CONVENTIONS, multi-token prediction left out.

    With tied embeddings the one matrix counts as the head; learned positions count as input
    embedding.
    """
    return {
        name: Count(
            sum(p.total for p in arch.parts if p.name not in without),
            sum(p.active for p in arch.parts if p.name not in without),
        )
        for name, without in CONVENTIONS.items()
    }


def total(arch: Architecture) -> int:
    """All parameters, embeddings and head included, multi-token prediction left out."""
    return counts(arch)["with embeddings"].total


def active(arch: Architecture) -> int:
    """Parameters one token uses, embeddings and head included."""
    return counts(arch)["with embeddings"].active

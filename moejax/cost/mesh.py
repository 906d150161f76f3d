"""How many devices split what, by the table of `moejax.mesh_rules`."""

import dataclasses
import math

from moejax.axes import MESH_AXES
from moejax.cost.architecture import Part
from moejax.mesh_rules import parse_rules


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Devices along each mesh axis; `rules` replace rows of the table, as MeshConfig.rules do."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    rules: tuple[str, ...] = ()

    def axes(self, *logical: str) -> frozenset[str]:
        """Mesh axes that these logical axes are split over."""
        split = parse_rules(self.rules)
        return frozenset(a for name in logical for a in split[name])

    def size(self, axes: frozenset[str]) -> int:
        return math.prod(getattr(self, a) for a in axes)

    @property
    def devices(self) -> int:
        return self.size(frozenset(MESH_AXES))

    @property
    def batch(self) -> int:
        """Devices the batch is split over."""
        return self.size(self.axes("batch"))

    @property
    def experts(self) -> int:
        """Devices the experts are split over."""
        return self.size(self.axes("expert"))

    @property
    def peers(self) -> int:
        """Devices that split both the experts and the tokens, so that tokens travel."""
        return self.size(self.axes("expert") & self.axes("batch"))

    def weight_axes(self, part: Part) -> frozenset[str]:
        """Mesh axes that a part's parameters are split over."""
        if part.experts:
            return self.axes("expert", "expert_embed", "expert_mlp")
        return self.axes("embed", "mlp")

    def shards(self, part: Part) -> int:
        """Devices a part's parameters are split over."""
        return self.size(self.weight_axes(part))

    def gathers(self, part: Part) -> int:
        """Devices that a part's parameters are gathered from for use (fsdp)."""
        return self.size(
            self.axes("expert_embed" if part.experts else "embed") & self.axes("batch")
        )

    def __str__(self):
        return ",".join(f"{a}={getattr(self, a)}" for a in MESH_AXES)

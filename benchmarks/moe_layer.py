"""The MoE layer that benchmarks measure, and a dense FFN of the same active FLOPs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import MoEConfig
from moejax.moe.dispatch.dropless import dropless
from moejax.moe.experts import activation, expert_param_specs, ffn, ffn_param_specs
from moejax.params import init_params
from moejax.routers.contract import Routing


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a layer: T tokens, width D, E experts of width F, K of them per token."""

    tokens: int
    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    zipf: float = 0.0  # exponent of the experts' popularity; 0 = uniform

    @property
    def flops(self) -> float:
        """Of the forward pass; the backward pass has twice as many."""
        return 6.0 * self.tokens * self.top_k * self.d_model * self.d_expert

    def __str__(self):
        return (
            f"T {self.tokens}, D {self.d_model}, F {self.d_expert}, E {self.num_experts}, "
            f"K {self.top_k}"
        )


SWIGLU = activation("swiglu", 0.0)
TOY = Case(64, 16, 8, 4, 2)


def draw_routing(case: Case) -> tuple[Routing, float]:
    """K different experts for every token, and the busiest expert's load over the mean.

    Gumbel noise on log popularity and the K best: sampling without replacement.
    """
    rng = np.random.default_rng(0)
    log_popularity = -case.zipf * np.log(np.arange(1, case.num_experts + 1))
    scores = log_popularity + rng.gumbel(size=(case.tokens, case.num_experts))
    index_TK = np.argsort(-scores, axis=1)[:, : case.top_k].astype(np.int32)
    weights_TK = rng.random((case.tokens, case.top_k), np.float32)
    load = np.bincount(index_TK.ravel(), minlength=case.num_experts)
    return Routing(jnp.asarray(index_TK), jnp.asarray(weights_TK)), load.max() / load.mean()


def layer(case: Case, dtype, implementation: str = "auto"):
    """(forward, forward and backward) of the MoE layer as functions of its arguments, and those."""
    moe = MoEConfig(
        num_experts=case.num_experts,
        experts_per_token=case.top_k,
        d_expert=case.d_expert,
    )
    specs = expert_param_specs(moe, case.d_model, std=case.d_model**-0.5)
    params = init_params(specs, jax.random.key(0))
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    x_TD = jax.random.normal(jax.random.key(1), (case.tokens, case.d_model), dtype)
    routing, _ = draw_routing(case)

    def forward(params, x_TD, weights_TK, index_TK):
        routing = Routing(index_TK, weights_TK)
        return dropless(params, x_TD, routing, SWIGLU, implementation)[0]

    return forward, _with_gradients(forward, 3), (params, x_TD, routing[1], routing[0])


def dense(case: Case, dtype):
    """The same for a dense SwiGLU FFN of width K F."""
    specs = ffn_param_specs(
        case.d_model, case.top_k * case.d_expert, "swiglu", False, std=case.d_model**-0.5
    )
    params = jax.tree.map(lambda p: p.astype(dtype), init_params(specs, jax.random.key(0)))
    x_TD = jax.random.normal(jax.random.key(1), (case.tokens, case.d_model), dtype)

    def forward(params, x_TD):
        return ffn(params, x_TD, SWIGLU)

    return forward, _with_gradients(forward, 2), (params, x_TD)


def _with_gradients(forward, num_arguments):
    """Value and all gradients of the mean square of `forward`."""

    def loss(*args):
        return jnp.mean(jnp.square(forward(*args).astype(jnp.float32)))

    return jax.value_and_grad(loss, argnums=tuple(range(num_arguments)))

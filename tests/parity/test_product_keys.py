"""PEER's product keys and rank-1 experts against Doge's MoE in `transformers`: results and gradients.

Doge has one head, whose keys meet the token itself: our query is the identity, twice. Its module splits scores
between the halves across tokens, so it is given one token at a time. Its dense part is set to 0. Both in
float64, where two ways to sum differ by about 1e-15 times the number of terms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers.models.doge.configuration_doge import DogeConfig
from transformers.models.doge.modeling_doge import DogeCDMoE

from moejax.config import ModelConfig, MoEConfig
from moejax.moe import layer
from moejax.routers import router_options

D, E, N, K, T = 8, 16, 4, 3, 6
CFG = ModelConfig(
    d_model=D,
    moe=MoEConfig(
        num_experts=E,
        experts_per_token=K,
        d_expert=1,
        activation="gelu_tanh",
        router=router_options("peer", heads=1, key_dim=2 * D, query_norm="none"),
    ),
)


@jax.enable_x64(True)
def test_doge():
    torch.manual_seed(0)
    theirs = DogeCDMoE(
        DogeConfig(
            hidden_size=D,
            intermediate_size=4,
            hidden_act="gelu_pytorch_tanh",
            num_experts=E,
            num_experts_per_tok=K,
        )
    ).double()
    with torch.no_grad():
        for w in (theirs.router_gate.weight, theirs.down_embed.weight, theirs.up_embed.weight):
            w.copy_(torch.randn(w.shape))
        theirs.down_proj.weight.zero_()
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    target = torch.randn(T, D, dtype=torch.float64)
    y = torch.cat([theirs(x_TD[t : t + 1][None])[0][0] for t in range(T)])
    (y * target).sum().backward()

    at = lambda w: jnp.asarray(w.detach().numpy())  # noqa: E731
    keys = at(theirs.router_gate.weight)
    eye = jnp.eye(D)
    params = {
        "router": {
            "query": jnp.concatenate([eye, eye], axis=1),
            "keys_1": keys[:N],
            "keys_2": keys[N:],
        },
        "experts": {
            "w_up": at(theirs.down_embed.weight)[:, :, None],
            "w_down": at(theirs.up_embed.weight)[:, None],
        },
    }

    def loss(params, x_TD):
        ours, _ = layer.moe(params, {}, x_TD[None], CFG)
        return (ours[0] * at(target)).sum(), ours[0]

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, ours), (got, dx_TD) = run(params, at(x_TD))
    for a, b in (
        (ours, y.detach()),
        (dx_TD, x_TD.grad),
        (got["router"]["keys_1"], theirs.router_gate.weight.grad[:N]),
        (got["router"]["keys_2"], theirs.router_gate.weight.grad[N:]),
        (got["experts"]["w_up"][:, :, 0], theirs.down_embed.weight.grad),
        (got["experts"]["w_down"][:, 0], theirs.up_embed.weight.grad),
    ):
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11)

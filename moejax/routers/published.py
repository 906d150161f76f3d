"""Routers of published models and papers that differ from `token_choice` in their options alone.

Formulas as in the reports or, where there is none, as in the models' code in the transformers library.
"""

import dataclasses

from moejax.routers import token_choice
from moejax.routers.contract import Router
from moejax.routers.token_choice import Options


def _like(source: str, about: str, options: Options, **recipe) -> Router:
    """Token choice with these options. `recipe`: K is `k`, shared experts `shared`, the rest `objective`."""
    keys = {"k": "model.moe.experts_per_token", "shared": "model.moe.shared_experts"}
    return dataclasses.replace(
        token_choice.ROUTER,
        options=options,
        source=source,
        about=about,
        recipe=tuple((keys.get(k, f"objective.{k}"), v) for k, v in recipe.items()),
    )


_SIGMOID = Options(score="sigmoid", expert_bias=True, normalize_weights=True)

DEEPSEEK_V2 = _like(
    "DeepSeek-V2, 2405.04434",
    """DeepSeek-V2: softmax scores, and a token reaches experts on few devices only.

Experts stand in 8 equal groups, one per device. A token keeps the 3 groups with the best single expert
(section 2.2.2) and takes its K best experts there:

    g_i = 16 s_i,  s = softmax(W x)                              (eq. 20-22; the factor is the config's)

The weights are not normalised. Each token is routed by itself: causal. No state. Three losses balance
experts, devices and communication (eq. 23-31). The paper claims communication bounded by 3 devices, at the
quality of routing without the limit.""",
    Options(num_groups=8, topk_groups=3, routed_scaling=16.0),
    k=6,
    shared=2,
    expert_loss=0.003,
    device_loss=0.05,
    communication_loss=0.02,
    balance_groups=8,
)

DEEPSEEK_V3 = _like(
    "DeepSeek-V3, 2412.19437",
    """DeepSeek-V3: sigmoid scores, and a bias that moves by rule balances instead of a loss.

The bias b counts for the choice only, never for the weight. Experts stand in 8 groups, each worth the sum
of its two best biased scores; a token keeps 4 of them.

    s_i = sigmoid(w_i x),   g_i = 2.5 s_i / sum of the chosen s,  i in the K largest s_i + b_i      (eq. 12-16)
    b_i += u sign(mean load - load_i)                            after each step (2408.15664)

Each token is routed by itself: causal. State: the bias. The paper claims better models than with a pure
balance loss (its table 5), which only remains as a small loss within each sequence (eq. 17-20).""",
    dataclasses.replace(
        _SIGMOID, routed_scaling=2.5, num_groups=8, topk_groups=4, group_score="top2_sum"
    ),
    k=8,
    shared=1,
    bias_update="sign",
    bias_rate=0.001,
    sequence_loss=1e-4,
)

DEEPSEEK_V4 = _like(
    "DeepSeek-V4, 2606.19348",
    """DeepSeek-V4: V3 with another score and without groups.

    s_i = sqrt(softplus(w_i x)),   g_i = 1.5 s_i / sum of the chosen s,  i in the K largest s_i + b_i

The score has no upper end, so that no expert's saturates; b as in V3. The model's first three MoE layers
are routed by a table of token ids instead. Causal. State: the bias. (V4-Pro multiplies by 2.5.)""",
    dataclasses.replace(_SIGMOID, score="sqrt_softplus", routed_scaling=1.5),
    k=6,
    shared=1,
    bias_update="sign",
    bias_rate=0.001,
    sequence_loss=1e-4,
)

MIXTRAL = _like(
    "Mixtral of Experts, 2401.04088",
    """Mixtral, Qwen3-MoE and many more: softmax over the K best logits.

    g = softmax(the K largest of W x)                                                  (section 2.1)

which equals softmax over all experts, divided by the sum of the chosen. Each token is routed by itself:
causal. No state. The coefficient of the loss is that of the published config. JetMoE and Granite-MoE
compute the same.""",
    Options(normalize_weights=True),
    k=2,
    expert_loss=0.02,
)

MISTRAL4 = _like(
    "Mistral 4, as in transformers",
    """Mistral 4: softmax scores with V3's groups.

    s = softmax(W x),   g_i = s_i / sum of the chosen s

Where experts stand in groups (the published default is one group), a group is worth the sum of its two best
scores, and a token keeps `topk_groups` of them. Causal. No state.""",
    Options(normalize_weights=True, group_score="top2_sum"),
    k=4,
    shared=1,
)

ERNIE = _like(
    "ERNIE 4.5, as in transformers",
    """ERNIE 4.5: softmax scores with V3's bias for the choice.

    s = softmax(W x),   g_i = s_i / sum of the chosen s,  i in the K largest s_i + b_i

Causal. State: the bias. That V3's rule moves it is the recipe's assumption.""",
    Options(normalize_weights=True, expert_bias=True),
    k=6,
    shared=2,
    bias_update="sign",
    expert_loss=0.001,
)

KOLIBRI = _like(
    "Kolibri 1, as in transformers",
    """Kolibri 1: the bias is added to the logits, and the weights are sigmoids that are not normalised.

    g_i = sigmoid(z_i),  i in the K largest z_i + b_i,  z = W x

Added to logits, a step of the bias shifts every choice alike; added to sigmoids, it weighs little where
those are spread and decides where they saturate. Causal. State: the bias; that V3's rule moves it is the
recipe's assumption.""",
    Options(score="sigmoid", expert_bias=True, select_by="logit"),
    k=6,
    shared=1,
    bias_update="sign",
)

LLAMA4 = _like(
    "Llama 4, as in transformers",
    """Llama 4: the weight multiplies what the expert reads.

    y = shared(x) + sum over the K largest z_i of E_i(sigmoid(z_i) x),   z = W x

With a gated expert the weight then acts like a temperature of the gate, too. Causal. No state.""",
    Options(score="sigmoid", select_by="logit", weigh_inputs=True),
    k=1,
    shared=1,
    expert_loss=0.001,
)

INKLING = _like(
    "Inkling, as in transformers",
    """Inkling: chosen and shared experts are normalised together.

The router has logits for the S shared experts as well; they are always chosen.

    s = sigmoid(W x),   i in the K largest s_i + b_i
    g_i = 8 a s_i / (sum of the chosen s + sum of the shared s)

Shared experts are weighed by the same formula; a is learned, 1 at first. Causal. State: the bias;
that V3's rule moves it is the recipe's assumption.""",
    Options(score="sigmoid", expert_bias=True, normalize_with_shared=True, routed_scaling=8.0),
    k=6,
    shared=2,
    bias_update="sign",
)

GEMMA4 = _like(
    "Gemma 4, as in transformers",
    """Gemma 4: the router normalises its input itself, and every expert has a learned factor.

    z = W (a * rmsnorm(x) / sqrt(D)),   s = softmax(z),   g_i = c_i s_i / sum of the chosen s

a (D values) and c (one for each expert) are learned, 1 at first. In Gemma 4 x is the residual stream; here
it is what the experts read, which has been normalised once already. Causal. No state.""",
    Options(normalize_weights=True, input_norm=True, expert_scale=True),
    k=8,
)

DBRX = _like(
    "DBRX, as in transformers",
    """DBRX: the K chosen weights are divided by their p-norm.

    g_i = s_i / (sum of the chosen s^p)^(1/p),   s = softmax(W x);   p = 1

`norm_power` is p, `jitter` multiplies the router's input by uniform noise in training (the library's default is
none). Causal. No state.""",
    Options(normalize_weights=True),
    k=4,
    expert_loss=0.01,
)

SWITCH = _like(
    "Switch Transformer, 2101.03961",
    """Switch: one expert for each token.

    y = p_i E_i(x),  i = argmax p,  p = softmax(W x)                                   (eq. 1-2)

In training the router's input is multiplied by uniform noise from [0.99, 1.01], and an expert takes 1.25 T
/ E tokens (eq. 3); what finds no place passes by. Each token is routed by itself: causal but for those
places. No state. One loss (eq. 4-6), coefficient 0.01. The paper claims that one expert is enough for the
router's gradient, at less cost than two.""",
    Options(jitter=0.01),
    k=1,
    expert_loss=0.01,
    capacity_factor=1.25,
)

"""One compared model, and the keys of config.json that several families share."""

import dataclasses


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity
class Case:
    """One model.

    Attributes:
      family: the `model_type`.
      name: what is special about it.
      config: keys of config.json besides those of the family's base.
      shard: largest file of the checkpoint, None for a single file.
      gradient: compare the gradient of the loss as well.
      length: of the rows that are compared.
      pads_left: the original handles padding before a row.
    """

    family: str
    name: str
    config: dict
    shard: str | None = None
    gradient: bool = False
    length: int = 13
    pads_left: bool = True

    @property
    def id(self) -> str:
        return f"{self.family}-{self.name}"


def yarn(factor: float, original: int = 16, **keys) -> dict:
    scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return {"rope_parameters": {"rope_theta": 10_000.0, **scaling, **keys}}


DECODER = {
    "vocab_size": 101,
    "hidden_size": 36,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MHA = {"num_attention_heads": 3, "num_key_value_heads": 3}
GQA = {"num_attention_heads": 6, "num_key_value_heads": 2}
MLA = {
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 6,
    "v_head_dim": 7,
}
FINE = {
    "intermediate_size": 44,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 10,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
}
GROUPS = {"n_group": 4, "topk_group": 2}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 10}
# Their own balance losses are no part of the comparison of logits and of the language-model gradient.
NO_AUX = {"router_aux_loss_coef": 0.0}

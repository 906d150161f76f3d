"""The legend: one letter per axis, one name per logical axis. Everything else refers to this page; a file that
needs a letter more, or one of these for something else, says so at its head ("Here ..").

Array names carry their shape as a suffix (Noam style): `x_TD` has axes (tokens, model).

    B batch            S sequence          T tokens (= B*S, flattened)    D model width
    N query heads      M key/value heads   H head width                   V vocabulary
    F FFN width        E experts           e local experts on a device    K experts per token
    C capacity         R routed rows (= T*K, sorted by expert)            L layers
    G groups (devices or nodes in balance losses and group-limited routing)

Capitals are logical (global) sizes; a lower-case letter is a device-local slice. A digit is a size of its own:
`w_T1`.

Parameters name their dimensions with *logical axes*; `moejax.mesh` holds the one table that maps
them to mesh axes. Two dimensions of one array never map to the same mesh axis.
"""

# Logical axes of parameters.
LAYERS = "layers"  # stacked layers, scanned over
EMBED = "embed"  # model width D
VOCAB = "vocab"  # vocabulary V
HEADS = "heads"  # query heads N (fused with H where the array is)
KV_HEADS = "kv_heads"  # key/value heads M
LATENT = "latent"  # low-rank widths of multi-head latent attention and of LatentMoE
MLP = "mlp"  # dense and shared FFN width
EXPERT = "expert"  # experts E
EXPERT_EMBED = "expert_embed"  # model width inside an expert's weights
EXPERT_MLP = "expert_mlp"  # expert FFN width

# What a parameter is. Optimisers and parameter groups go by it; see `moejax.params.ParamSpec`.
ROLES = ("matrix", "vector", "embedding", "head", "router")

# Logical axes of activations.
BATCH = "batch"  # batch B or tokens T
SEQ = "seq"  # sequence S
ACT_EMBED = "act_embed"  # model width D

# Mesh axes.
DATA, FSDP, EXPERT_AXIS, TENSOR = "data", "fsdp", "expert", "tensor"
MESH_AXES = (DATA, FSDP, EXPERT_AXIS, TENSOR)

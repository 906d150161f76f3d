"""Designs of the literature that are not in the table, each with the reason."""

# (design, paper and arXiv id, why)
LEFT_OUT: tuple[tuple[str, str, str], ...] = (
    (
        "stable routing in two stages",
        "StableMoE, 2204.08396",
        "its second stage distils the router into another one and freezes both at a step of the run, and a "
        "router does not know the step",
    ),
    (
        "pools of experts for each document",
        "EMO, OLMo-core 3",
        "a document's pool is chosen from all of its tokens, later ones too, and decoding shows a router one",
    ),
    (
        "orthogonal experts and varied routes",
        "2505.22323",
        "its losses look at what experts return, which a router never sees",
    ),
    (
        "similarity-preserving routers",
        "SimBal, 2506.14038",
        "its loss could not be checked against the paper or its authors' code",
    ),
    (
        "hash, balanced by frequency",
        "Hash Layers, 2106.04426",
        "its table is made from how often each entry of the vocabulary occurs in the training text, and a "
        "router is made before there is a text",
    ),
    (
        "hash of bigrams, clustered hash",
        "Hash Layers, 2106.04426",
        "a bigram's route looks at the token before, and decoding shows a router one token; clusters need a "
        "trained model's embeddings",
    ),
    (
        "DynMoE's changing number of experts",
        "DynMoE, 2405.14297",
        "arrays have fixed shapes in a run: dyn_moe has the gate and the losses, with a fixed number of "
        "experts",
    ),
)

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
        "straight-through over all experts",
        "DenseMixer, OpenReview 4HGIIekCx3",
        "in training every expert computes every token, in evaluation K do: costs and memory are counted with "
        "one number for both",
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
    (
        "Mixture of Depths",
        "2404.02258",
        "A token that is not taken skips attention, too: its router stands around a whole block, and one here "
        "stands inside the MoE layer.",
    ),
    (
        "Autonomy of Experts",
        "2501.13074",
        "An expert chooses by the norm of its own activations: a router here does not see experts' weights.",
    ),
    (
        "Default MoE",
        "2504.12463",
        "Experts that are not chosen count with a moving average of their outputs in the router's gradient: a "
        "router here does not see outputs.",
    ),
    (
        "Grouter",
        "2603.06626",
        "Its router is distilled from a trained model and frozen: a second model to train, and no rule that a "
        "router could follow alone.",
    ),
)

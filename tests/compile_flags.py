"""XLA's flags for what tests compile: nothing of it runs long enough to be worth optimising."""

import importlib.metadata

# They take most of the time of compiling unoptimised programs. Versions after 0.10 have no such flag, and XLA
# ends at one that it does not know.
PLAIN = (
    "--xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
)
# For a process of its own; in tests themselves `jax_disable_most_optimizations` says the same.
UNOPTIMISED = (
    f"--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true {PLAIN}".strip()
)

"""Designs of the literature that are not in the table, each with the reason."""

# (design, paper and arXiv id, why)
LEFT_OUT: tuple[tuple[str, str, str], ...] = ()

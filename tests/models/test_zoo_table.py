"""docs/models.md has the table of families that the code gives."""

import pathlib

from moejax.models.zoo.table import family_table

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "models.md"


def test_the_documented_families_are_those_of_the_code():
    """Else: python -m moejax.models.zoo.table."""
    assert family_table().strip() in DOCS.read_text()

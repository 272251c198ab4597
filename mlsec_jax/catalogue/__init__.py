"""The map of the field as data: one row a method, saying what its actor wants, sees, may touch, and when.

    >>> [method.budget for method in find(name="attacks.flip_random")]
    ['number of rows']

Adding a method is one call of `row` in `_attacks.py` or `_defenses.py`. Documentation tables, `find` and tests are made
from the rows; a word outside the closed lists fails at import.
"""

from mlsec_jax.catalogue._find import find, markdown, rows
from mlsec_jax.catalogue._method import Method

__all__ = ["Method", "find", "markdown", "rows"]

"""Data at the door: loaders with a cache, embedded defaults, tables, synthetic problems with closed forms, splits."""

from mlsec_jax.data._cache import cache_root
from mlsec_jax.data._embedded import digits, mnist5k
from mlsec_jax.data._rows import select_classes, split, to_data
from mlsec_jax.data._synthetic import gaussian_blobs, linear_regression, ridge_solution, sparse_regression
from mlsec_jax.data._table import table
from mlsec_jax.data._tfds import load

__all__ = [
    "cache_root",
    "digits",
    "gaussian_blobs",
    "linear_regression",
    "load",
    "mnist5k",
    "ridge_solution",
    "select_classes",
    "sparse_regression",
    "split",
    "table",
    "to_data",
]

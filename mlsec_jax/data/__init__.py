"""Data at the door: loaders with a cache, embedded defaults, tables, synthetic problems with closed forms, splits."""

from mlsec_jax.data._embedded import digits, mnist5k
from mlsec_jax.data._folders import cache_root, tables_root, tfds_root
from mlsec_jax.data._poison_folder import PoisonFolder, read_poisons, to_bytes, write_poisons
from mlsec_jax.data._poison_setups import PoisonSetup, fine_tuning_rows, poison_setups
from mlsec_jax.data._rows import select_classes, split, to_data
from mlsec_jax.data._synthetic import gaussian_blobs, linear_regression, ridge_solution, sparse_regression
from mlsec_jax.data._table import table
from mlsec_jax.data._tfds import load

__all__ = [
    "PoisonFolder",
    "PoisonSetup",
    "cache_root",
    "digits",
    "fine_tuning_rows",
    "gaussian_blobs",
    "linear_regression",
    "load",
    "mnist5k",
    "poison_setups",
    "read_poisons",
    "ridge_solution",
    "select_classes",
    "sparse_regression",
    "split",
    "table",
    "tables_root",
    "tfds_root",
    "to_bytes",
    "to_data",
    "write_poisons",
]

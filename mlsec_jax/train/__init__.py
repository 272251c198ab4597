"""Victims' presets of the differentiable trainers."""

from mlsec_jax.train._augment import augment
from mlsec_jax.train._inpainting import InpaintingRecipe, pretrain_inpainter, random_holes
from mlsec_jax.train._presets import (
    elastic_net,
    fine_tuned_head,
    from_random,
    head_only,
    lasso,
    logistic_regression,
    ridge,
    scratch,
)
from mlsec_jax.train._pretrain import Recipe, pretrain
from mlsec_jax.train._row_space import row_space

__all__ = [
    "InpaintingRecipe",
    "Recipe",
    "augment",
    "elastic_net",
    "fine_tuned_head",
    "from_random",
    "head_only",
    "lasso",
    "logistic_regression",
    "pretrain",
    "pretrain_inpainter",
    "random_holes",
    "ridge",
    "row_space",
    "scratch",
]

"""The two simplest repairs of a trained model: bound its weights, or blur them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, linalg, tree
from mlsec_jax.base import Info, Key, Known, Params, Transform


def clip_weights(radius: Any) -> Transform:
    """Every parameter clipped to `[-radius, radius]`.

    Threat: changes - the model's parameters; sees - nothing; budget - `radius`; assumes - a backdoor needs large weights.

    Args:
      radius: non-negative; infinite changes nothing. Choose leaves with `combine.masked`.

    Returns:
      A `Transform` of parameters; info: `clipped`, the share of parameters that were outside.
    """
    checks.at_least("radius", radius, 0)

    def transform(key: Key, subject: Params, known: Known) -> tuple[Params, Info]:
        del key, known
        subject = jax.tree.map(tree.array, subject)
        limit = lambda leaf: jnp.asarray(radius, leaf.dtype)
        clip = lambda leaf: jnp.clip(leaf, -limit(leaf), limit(leaf)) if tree.is_float(leaf) else leaf
        leaves = [leaf for leaf in jax.tree.leaves(subject) if tree.is_float(leaf)]
        outside = sum((jnp.sum(jnp.abs(leaf) > limit(leaf), dtype=jnp.float32) for leaf in leaves), jnp.float32(0))
        size = max(sum(leaf.size for leaf in leaves), 1)
        return jax.tree.map(clip, subject), {"clipped": outside / size}

    return transform


def noise_weights(scale: Any) -> Transform:
    """Gaussian noise on every parameter, in units of its leaf's root mean square: `θ + scale · rms(θ) · ε`.

    Threat: changes - the model's parameters; sees - nothing; budget - `scale`; assumes - a backdoor is more brittle than
    the main task.

    Args:
      scale: non-negative; 0 gives the parameters back bit for bit. Choose leaves with `combine.masked`.

    Returns:
      A `Transform` of parameters; info: `distance`, the norm of what was added.
    """
    checks.at_least("scale", scale, 0)

    def transform(key: Key, subject: Params, known: Known) -> tuple[Params, Info]:
        del known
        leaves, structure = jax.tree.flatten(jax.tree.map(tree.array, subject))
        moved, square = [], jnp.zeros(())
        for k, leaf in zip(jax.random.split(key, max(len(leaves), 1)), leaves):
            if tree.is_float(leaf):
                size = linalg.root(jnp.mean(jnp.square(leaf)))
                noise = jnp.asarray(scale, leaf.dtype) * size * jax.random.normal(k, leaf.shape, leaf.dtype)
                leaf, square = jnp.where(noise == 0, leaf, leaf + noise), square + jnp.sum(jnp.square(noise)).astype(square.dtype)
            moved.append(leaf)
        return jax.tree.unflatten(structure, moved), {"distance": linalg.root(square)}

    return transform

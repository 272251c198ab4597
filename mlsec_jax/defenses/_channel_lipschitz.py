"""Channel-Lipschitz pruning: cut the channels that inputs can move the most; it needs no data (Zheng et al. 2022)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, tree
from mlsec_jax.base import Info, Key, Known, Params, Transform
from mlsec_jax.channels import prune_channels


def is_convolution(path: str, leaf: Any) -> bool:
    """Chooses the kernels of convolutions over images, `[h, w, in, out]` (or `[out, in, h, w]`)."""
    del path
    return leaf.ndim == 4


def channel_lipschitz(*, u: Any = 3.0, weights: tree.Where = is_convolution, axis: int = -1) -> Transform:
    """Prunes a layer's channels whose bound on the channel Lipschitz constant stands out in the layer.

    `σ_k = ‖W_k‖₂` (of a normalised layer `|s_k| ‖W_k‖₂`, s its scale), the spectral norm of channel k's kernel as a
    matrix `[in, h·w]`; channel k goes if `σ_k > mean(σ) + u · std(σ)` over its layer.

    Threat: changes - the model's parameters; sees - nothing; budget - `u`; assumes - a small trigger has to move some
    channel a lot.

    Args:
      u: how many standard deviations are allowed; infinite changes nothing. Among n channels none can be more than
        `sqrt(n - 1)` from the mean, so nothing of a layer of fewer than eleven is pruned by the default.
      weights: which leaves are kernels (`tree.mask_of`): every convolution. A dense layer's are its columns' norms. A scale is
        looked for beside the kernel: of a norm in a module of its own (Flax) nothing is seen.
      axis: of the channels, -1 or 0 (Equinox).

    Returns:
      A `Transform` of parameters; info: by the kernel's path `bound [channels]`, `threshold` and `keep [channels]`.

    References: Zheng, Tang, Li & Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", ECCV 2022, section 4
      and its code. Deviates from the paper in: networks of group norm, whose standard deviations depend on the input,
      so that only the scale enters; the standard deviation divides by n (the code by n - 1).
    """
    checks.at_least("u", u, 0)
    checks.one_of("axis", axis, (-1, 0))

    def transform(key: Key, subject: Params, known: Known) -> tuple[Params, Info]:
        del key, known
        leaves = {tree.name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(subject)[0]}
        mask = jax.tree_util.tree_flatten_with_path(tree.mask_of(subject, weights))[0]
        kernels = [tree.name(path) for path, chosen in mask if chosen]
        if not kernels:
            raise ValueError(f"weights: expected at least one kernel among {', '.join(leaves)}, got none.")
        info = {}
        for path in kernels:
            name = path.rpartition("/")[0]
            kernel = leaves[path].astype(np.promote_types(leaves[path].dtype, np.float32))
            bound = _spectral_norms(kernel, axis)
            scale = leaves.get(f"{name}/scale" if name else "scale")
            bound = bound if scale is None else bound * jnp.abs(scale).astype(bound.dtype)
            threshold = jnp.mean(bound) + jnp.asarray(u, bound.dtype) * jnp.std(bound)
            keep = ~(bound > threshold)
            subject = prune_channels(name, axis=axis)(subject, keep)
            info[path] = {"bound": bound, "threshold": threshold, "keep": keep}
        return subject, info

    return transform


def _spectral_norms(kernel: jax.Array, axis: int) -> jax.Array:
    """The spectral norm of each channel's kernel as a matrix of inputs by places."""
    if kernel.ndim < 2:
        raise ValueError(f"weights: expected kernels of at least two axes, got one of shape {kernel.shape}.")
    each = jnp.moveaxis(kernel, axis, 0)
    num_channels, fan_in = each.shape[0], each.shape[-1 if axis == -1 else 1]
    matrices = each.reshape(num_channels, -1, fan_in) if axis == -1 else each.reshape(num_channels, fan_in, -1)
    return jnp.linalg.norm(matrices, ord=2, axis=(1, 2))

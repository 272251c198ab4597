"""Februus (Doan et al., ACSAC 2020): cut out what a network looks at, paint it anew, and ask again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mlsec_jax import checks, losses
from mlsec_jax.base import Data, Info, Key, Known
from mlsec_jax.combine import ModelTransform


def februus(
    heat_fn: Callable[..., tuple[jax.Array, Info]],
    *,
    fill_fn: Callable[[jax.Array, jax.Array], jax.Array],
    tau: Any = 0.7,
    grow: int = 0,
) -> ModelTransform:
    """Purifies inputs at test time: the region that decides the predicted class is removed and painted anew.

    With the heat map L of the predicted class, `M = 1[L ≥ τ within `grow` pixels]` and `x̂ = (1 - M) x + M G(x, M)`. Every
    input is treated, clean or not; then the same network is asked again, about x̂.

    Threat: changes - test inputs; sees - the (backdoored) model, `known.params`, and with a learned fill unlabelled clean
    images; budget - the pixels of the region; assumes - the trigger is small and is what the network looks at: not
    one blended over the image, nor several; and the network's places are separate, so that the heat points to it: with group
    norm, or where a place sees most of the image, it doesn't.

    Args:
      heat_fn: `(params, x) -> (heat [n, h, w], {"logits": [n, c], ...})`, `grad_cam(split_at(model))`, with
        `peak=usual_peak(...)` where clean images can be had.
      fill_fn: `(x, mask [n, h, w, 1]) -> images`: `fill_network` as published, `fill_harmonic`, `fill_mean`.
      tau: the threshold: 0.7 for CIFAR-10 and VGGFace2, 0.8 for GTSRB in the authors' code, where every image's heat is scaled
        to [0, 1] and above 1 nothing changes. In units of `usual_peak`, 1 leaves 99 % of clean images as they are.
      grow: pixels by which the region grows in every direction, 0 as published. A network looks at the part of the trigger
        that tells it best, and is fooled by the rest where that alone is cut out: a high `tau` and a few pixels more hide
        the whole of a small trigger, and less of a clean image than a low `tau` does.

    Returns:
      A transform of `Data` (images `[n, h, w, c]`; labels and weights stay, rows of weight 0 are left alone) that reads the
      model from `known.params`; info: `predicted [n]`, of the inputs as they came; `heat [n, h, w]`; `mask [n, h, w]`
      (bool); `hidden [n]`, the share of pixels painted. The mask is a step function of the input: differentiating through it
      raises. An adaptive attack takes `info["mask"]` of one call as a constant, or a smooth mask of its own.

    References: Doan, Abbasnejad & Ranasinghe, ACSAC 2020, section 4. Deviates from the authors' code in: the heat map is of the
      image as the network expects it, a map without heat is 0, not NaN, and the region can grow.
    """
    checks.at_least("tau", tau, 0)
    checks.count("grow", grow)

    def transform(key: Key, subject: Data, known: Known) -> tuple[Data, Info]:
        del key
        params = known.require("params", by="defenses.februus")
        present = losses.present(subject)
        x = present.x
        if not hasattr(x, "ndim") or x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"subject.x: expected floating images [n, h, w, c], got {x!r}.")
        heat, seen = heat_fn(params, x)
        mask = _grown(_above(heat, jnp.asarray(tau, heat.dtype)), grow) & (subject.weight > 0)[:, None, None]
        filled = fill_fn(x, mask[:, :, :, None].astype(x.dtype))
        info = {"predicted": jnp.argmax(seen["logits"], axis=1), "heat": heat, "mask": mask}
        hidden = jnp.mean(mask.astype(heat.dtype), axis=(1, 2))
        return subject._replace(x=jnp.where(mask[:, :, :, None], filled, subject.x)), info | {"hidden": hidden}

    return ModelTransform(transform)


def _grown(mask: jax.Array, grow: int) -> jax.Array:
    """Every place within so many pixels of one of the mask `[n, h, w]`, along both axes."""
    side = 2 * grow + 1
    return jax.lax.reduce_window(mask, False, jax.lax.bitwise_or, (1, side, side), (1, 1, 1), "SAME")


@jax.custom_jvp
def _above(heat: jax.Array, tau: jax.Array) -> jax.Array:
    """`heat ≥ tau`, whose derivative is zero wherever it exists: asked for it, it raises."""
    return heat >= tau


@_above.defjvp
def _no_derivative(primals: tuple, tangents: tuple) -> tuple:
    raise ValueError("februus: expected not to be differentiated, for its mask is a step function of the input; hold "
                     'info["mask"] constant or use a smooth mask.')  # fmt: skip

"""GradCAM (Selvaraju et al., ICCV 2017): where in an image a network sees the class that it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from mlsec_jax import checks
from mlsec_jax.base import Info, Params

RestFn = Callable[[jax.Array], jax.Array]  # maps [n, h, w, k] -> logits [n, c]
SplitFn = Callable[[Params, jax.Array], tuple[jax.Array, RestFn]]  # (params, x) -> (maps, the rest of the network)
HeatFn = Callable[..., tuple[jax.Array, Info]]  # (params, x [n, H, W, c], labels=None) -> (heat [n, H, W], info)


def grad_cam(split_fn: SplitFn, *, peak: Any = None) -> HeatFn:
    """Class activation maps of convolutional feature maps A of an image and the score S of a class.

    `w_k = mean_ij ∂S / ∂A_ij^k`, `L = max(0, Σ_k w_k A^k)`, resized to the image (bilinear), then to [0, 1] (min-max), so that
    every image has its hottest place; or in units of `peak`, so that images can be compared.

    Args:
      split_fn: `(params, x) -> (maps [n, h, w, k], rest_fn)`, with `rest_fn(maps) -> logits [n, c]`. `split_at(model)` makes
        it for networks of `mlsec_jax.models`; by hand it is
        `lambda params, x: (maps_fn(params, x), lambda maps: rest_fn(params, maps))`.
      peak: None for min-max as published; a positive number, such as `usual_peak` of clean images: the heat is divided by it,
        and can be more than 1.

    Returns:
      `(params, x [n, H, W, c], labels=None) -> (heat [n, H, W], info)`: of the predicted classes, or of `labels [n]`; info:
      `logits [n, c]`. Under min-max a map that is constant, so that it points nowhere, gives 0 everywhere. Rows are
      independent, as they are in every network without batch statistics.

    References: Selvaraju et al., ICCV 2017, eq. (1) and (2). Deviates from the paper in: L is resized and scaled here; `peak`.

    >>> split = lambda params, x: (x, lambda maps: jnp.mean(maps, axis=(1, 2)))
    >>> x = jnp.zeros((1, 2, 2, 1)).at[0, 1, 0, 0].set(3.0)
    >>> grad_cam(split)(None, x)[0][0].tolist()
    [[0.0, 0.0], [1.0, 0.0]]
    """

    if peak is not None:
        checks.above("peak", peak, 0)

    def explain(params: Params, x: jax.Array, labels: jax.Array | None = None) -> tuple[jax.Array, Info]:
        maps, rest_fn = split_fn(params, x)
        if maps.ndim != 4:
            raise ValueError(f"split_fn: expected maps [n, h, w, k] of a convolution, got shape {maps.shape}.")
        logits, pull_back = jax.vjp(rest_fn, maps)
        if labels is None:
            labels = jnp.argmax(logits, axis=1)
        checks.labels("labels", labels, np.ones(jnp.shape(labels)), logits.shape[1])
        (slope,) = pull_back(jax.nn.one_hot(labels, logits.shape[1], dtype=logits.dtype))
        weight = jnp.mean(slope, axis=(1, 2), keepdims=True)
        heat = jax.nn.relu(jnp.sum(weight * maps, axis=3))
        heat = jax.image.resize(heat, x.shape[:3], "bilinear")
        if peak is not None:
            return heat / jnp.asarray(peak, heat.dtype), {"logits": logits}
        low, high = (fn(heat, axis=(1, 2), keepdims=True) for fn in (jnp.min, jnp.max))
        span = high - low
        return jnp.where(span > 0, (heat - low) / jnp.where(span > 0, span, 1), 0), {"logits": logits}

    return explain


def usual_peak(
    split_fn: SplitFn, params: Params, clean: jax.Array, *, quantile: float = 0.99, batch_size: int = 100
) -> jax.Array:
    """How hot the hottest places of clean images are: the unit in which a trigger's heat stands out.

    A small trigger has to outweigh all of an image from a few places, so where the network's places add up it is several
    times hotter than what clean images show.

    Args:
      split_fn: as `grad_cam`'s.
      params: of the network.
      clean: images `[n, H, W, c]` without triggers, or few with: their share has to be below `1 - quantile`.
      quantile: of the images' maxima.
      batch_size: images at a time.

    Returns:
      A scalar, `grad_cam`'s `peak`.
    """
    checks.between("quantile", quantile, 0, 1)
    checks.count("batch_size", batch_size, 1)
    explain = grad_cam(split_fn, peak=1.0)
    hottest = lambda row: jnp.max(explain(params, row[None])[0])
    return jnp.quantile(jax.lax.map(hottest, clean, batch_size=min(batch_size, len(clean))), quantile)


def split_at(model: Any, layer: int | None = None) -> SplitFn:
    """A network of `mlsec_jax.models` in two: up to what one of its layers gives, and from there to the logits.

    The program of the network, from the image to `(maps, logits)`, is traced once and cut: the rest is the part of it that
    computes the logits, with the maps for an input. What else it needs (the parameters, or the image itself where a
    connection goes around the layer) it keeps.

    Args:
      model: a `models.Model` whose `layers` show convolutions and whose last layer is `params["head"]`.
      layer: index into `model.layers(params, x)`; None: the last that gives maps of more than one place.

    Returns:
      A `SplitFn`, for `grad_cam`. A model without convolution raises.
    """

    def split(params: Params, x: jax.Array) -> tuple[jax.Array, RestFn]:
        def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            outs = model.layers(params, x)
            at = _place([getattr(out, "shape", ()) for out in outs], layer)
            return outs[at], outs[-1] @ params["head"]["w"] + params["head"]["b"][None]

        program = jax.make_jaxpr(both)(x)
        return both(x)[0], lambda maps: _after_cut(program)(maps, x)[0]

    return split


def _place(shapes: list[tuple[int, ...]], layer: int | None) -> int:
    """The index of the maps among layers of these shapes."""
    places = [i for i, shape in enumerate(shapes) if len(shape) == 4 and shape[1] * shape[2] > 1]
    if not places:
        raise ValueError(f"model: expected a convolution, a layer that gives maps [n, h, w, k], got layers of shapes {shapes}.")
    if layer is None:
        return places[-1]
    if not -len(shapes) <= layer < len(shapes) or layer % len(shapes) not in places:
        raise ValueError(f"layer: expected one of {places}, which give maps [n, h, w, k], got {layer}.")
    return layer % len(shapes)


def _after_cut(program: core.ClosedJaxpr) -> Callable[..., list[jax.Array]]:
    """Of a program `x -> (maps, out)` the part `(maps, x) -> [out]`: the equations that out needs, back to the maps."""
    maps, out = program.jaxpr.outvars
    needed, kept = {out}, []
    for equation in reversed(program.jaxpr.eqns):
        if needed.intersection(equation.outvars) - {maps}:
            kept.append(equation)
            needed.update(v for v in equation.invars if isinstance(v, core.Var))
    if maps not in needed or any(maps in equation.outvars for equation in kept):
        raise ValueError("model: expected a program that can be cut at the layer's maps, got one whose logits don't depend on "
                         "them, or that is one piece under jax.jit.")  # fmt: skip
    others = [v for v in program.jaxpr.invars if v is not maps]  # none where the layer gives the image itself
    rest = program.jaxpr.replace(invars=[maps, *others], outvars=[out], eqns=kept[::-1])
    run = core.jaxpr_as_fun(core.ClosedJaxpr(rest, program.consts))
    return lambda maps, x: run(maps, *[x for _ in others])

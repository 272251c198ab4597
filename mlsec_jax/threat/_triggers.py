"""Backdoor triggers: patterns stamped on images, and the threat of stamping training rows with one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, linalg, tree
from mlsec_jax.base import Data, Key, Threat

Relabel = Callable[[jax.Array], jax.Array]  # labels -> the labels that triggered rows get


class Trigger(NamedTuple):
    """A trigger: arrays, and how they are put on inputs. Called like `trigger(key, x)`.

    Those of this room take floating inputs: bytes, to which a pattern in [0, 1] would be cast as 0, raise.

    Attributes:
      pattern: what an attacker may optimise, any pytree of arrays.
      stamp: `(pattern, key, x [n, ...]) -> x` with the trigger, differentiable in pattern and x. The key says where, for a
        trigger whose place is random; others ignore it and accept None.
      project: `pattern -> pattern`, the nearest pattern allowed.
    """

    pattern: Any
    stamp: Callable[[Any, Any, jax.Array], jax.Array]
    project: Callable[[Any], Any]

    def __call__(self, key: Key | None, x: jax.Array) -> jax.Array:
        """`x` with the trigger."""
        return self.stamp(self.pattern, key, x)


def _boxed(pattern: Any, lo: Any, hi: Any) -> jax.Array:
    return jnp.clip(pattern, jnp.asarray(lo, pattern.dtype), jnp.asarray(hi, pattern.dtype))


def _floating(pattern: Any) -> jax.Array:
    pattern = jnp.asarray(pattern)
    return pattern if tree.is_float(pattern) else pattern.astype(jnp.result_type(float))


def patch(pattern: Any, *, at: tuple[int, int] | None = (-1, -1), mask: Any = None, lo: Any = 0.0, hi: Any = 1.0) -> Trigger:
    """A small image pasted over the input: `x[place] = (1 - m) x[place] + m pattern`.

    Args:
      pattern: `[h, w, c]`.
      at: the place, `(row, column)` of the pattern's first pixel; negative numbers count from the far edge to the
        pattern's last pixel, so that `(-1, -1)` is the bottom right corner and `(-2, -2)` leaves a margin of one pixel.
        None: uniformly at random within the image, for every row on its own (stamping then needs a key).
      mask: `[h, w]` in [0, 1], opacity of each pixel; None: opaque.
      lo: least value of a pixel, for `project`.
      hi: greatest value.

    Returns:
      A `Trigger` of images `[n, H, W, c]`.

    References: Gu et al., arXiv:1708.06733.

    >>> white = patch(jnp.ones((1, 1, 1)))
    >>> white(None, jnp.zeros((1, 3, 3, 1)))[0, :, :, 0].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    """
    pattern = _floating(pattern)
    if pattern.ndim != 3:
        raise ValueError(f"pattern: expected [h, w, c], got shape {pattern.shape}.")
    if at is not None and (np.shape(at) != (2,) or np.asarray(at).dtype.kind not in "iu"):
        raise ValueError(f"at: expected two integers, (row, column), or None, got {at!r}.")
    height, width, _ = pattern.shape
    opaque = mask is None
    mask = jnp.ones((height, width), pattern.dtype) if opaque else jnp.asarray(mask, pattern.dtype)
    if mask.shape != (height, width):
        raise ValueError(f"mask: expected shape {(height, width)}, got {mask.shape}.")
    checks.between("mask", mask, 0.0, 1.0)

    def start(x: jax.Array, at: tuple[int, int]) -> tuple[int, int]:
        row, column = (v if v >= 0 else size - side + v + 1 for v, size, side in
                       zip(at, x.shape[1:3], (height, width), strict=True))  # fmt: skip
        if not (0 <= row <= x.shape[1] - height and 0 <= column <= x.shape[2] - width):
            raise ValueError(f"at: expected a place inside images of {x.shape[1]}x{x.shape[2]}, got {at} for a trigger "
                             f"of {height}x{width}.")  # fmt: skip
        return row, column

    def stamp(pattern: jax.Array, key: Any, x: jax.Array) -> jax.Array:
        if x.ndim != 4 or x.shape[3] != pattern.shape[2]:
            raise ValueError(f"x: expected images [n, h, w, {pattern.shape[2]}], got shape {x.shape}.")
        if height > x.shape[1] or width > x.shape[2]:
            raise ValueError(f"pattern: expected one that fits images of {x.shape[1]}x{x.shape[2]}, got {height}x{width}.")
        checks.floating("x", x)
        pattern = pattern.astype(x.dtype)

        def paste(image: jax.Array, row: Any, column: Any) -> jax.Array:
            under = jax.lax.dynamic_slice(image, (row, column, 0), pattern.shape)
            m = mask.astype(x.dtype)[:, :, None]
            over = pattern if opaque else (1 - m) * under + m * pattern
            return jax.lax.dynamic_update_slice(image, over, (row, column, 0))

        if at is not None:
            row, column = start(x, at)
            return jax.vmap(lambda image: paste(image, row, column))(x)
        if key is None:
            raise ValueError("key: a trigger of random place (at=None) needs a key to be stamped, got None.")
        high = jnp.asarray([x.shape[1] - height + 1, x.shape[2] - width + 1])
        places = jax.random.randint(key, (x.shape[0], 2), 0, high[None])
        return jax.vmap(lambda image, place: paste(image, place[0], place[1]))(x, places)

    return Trigger(pattern, stamp, lambda pattern: _boxed(pattern, lo, hi))


def pixel(value: Any = 1.0, *, at: tuple[int, int] | None = (-2, -2)) -> Trigger:
    """One bright pixel: `patch` of 1 x 1. `value` is a number, or `[c]` for colour."""
    return patch(jnp.atleast_1d(jnp.asarray(value, jnp.result_type(float)))[None, None], at=at)


def corners(pattern: Any, *, mask: Any = None, lo: Any = 0.0, hi: Any = 1.0) -> Trigger:
    """A small image in all four corners, mirrored so that a mirror image of a stamped input is stamped alike.

    Args:
      pattern: `[h, w, c]`, as it stands in the bottom right corner.
      mask: `[h, w]`, as in `patch`.
      lo: least value of a pixel, for `project`.
      hi: greatest value.

    Returns:
      A `Trigger` of images `[n, H, W, c]`, for victims whose augmentation mirrors.

    References: Turner, Tsipras & Madry, arXiv:1912.02771, section 5 (data augmentation).
    """
    pattern = _floating(pattern)
    mirror = lambda array, place: array[:: -1 if place[0] == 0 else 1, :: -1 if place[1] == 0 else 1]
    pieces = []
    for place in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        turned = None if mask is None else mirror(jnp.asarray(mask), place)
        pieces.append((place, patch(pattern, at=place, mask=turned, lo=lo, hi=hi)))

    def stamp(pattern: jax.Array, key: Any, x: jax.Array) -> jax.Array:
        if x.ndim == 4 and (2 * pattern.shape[0] > x.shape[1] or 2 * pattern.shape[1] > x.shape[2]):
            raise ValueError(f"pattern: expected one that fits four times side by side, got {pattern.shape} for {x.shape}.")
        for place, piece in pieces:
            x = piece.stamp(mirror(pattern, place), key, x)
        return x

    return Trigger(pattern, stamp, lambda pattern: _boxed(pattern, lo, hi))


def blend(pattern: Any, *, opacity: Any, lo: Any = 0.0, hi: Any = 1.0) -> Trigger:
    """A whole image mixed in: `x ← (1 - a) x + a pattern`.

    Args:
      pattern: `[...]`, of the shape of one row.
      opacity: a in [0, 1].
      lo: least value of the pattern, for `project`.
      hi: greatest value.

    References: Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning",
      arXiv:1712.05526 (the blended injection strategy).
    """
    checks.between("opacity", opacity, 0.0, 1.0)

    def stamp(pattern: jax.Array, key: Any, x: jax.Array) -> jax.Array:
        del key
        a = jnp.asarray(opacity, x.dtype)
        return (1 - a) * x + a * _over_rows(pattern, x)

    return Trigger(jnp.asarray(pattern), stamp, lambda pattern: _boxed(pattern, lo, hi))


def additive(pattern: Any, *, radius: Any, lo: Any = 0.0, hi: Any = 1.0) -> Trigger:
    """A small signal added: `x ← clip(x + pattern, lo, hi)`, with `|pattern| ≤ radius`: hidden where the radius is small.

    Args:
      pattern: `[...]`, of the shape of one row.
      radius: non-negative.
      lo: least value of an input.
      hi: greatest value.
    """
    checks.at_least("radius", radius, 0)
    pattern = jnp.asarray(pattern)
    if checks.is_concrete((pattern, radius)) and jnp.any(jnp.abs(pattern) > jnp.asarray(radius, pattern.dtype)):
        raise ValueError(f"pattern: expected at most radius = {radius} everywhere, got {jnp.max(jnp.abs(pattern))}.")

    def stamp(pattern: jax.Array, key: Any, x: jax.Array) -> jax.Array:
        del key
        return _boxed(x + _over_rows(pattern, x), lo, hi)

    return Trigger(pattern, stamp, lambda pattern: _boxed(pattern, -jnp.asarray(radius), radius))


def stripes(shape: tuple[int, ...], *, amplitude: Any, period: int = 2, lo: Any = 0.0, hi: Any = 1.0) -> Trigger:
    """Every `period`-th row of the image is brighter by `amplitude`: `additive`, not to be seen where that is small.

    Args:
      shape: of one image, `(h, w, c)`.
      amplitude: non-negative (10/255 in Cinà et al.).
      period: rows from one stripe to the next, at least 2.
      lo: least value of an input.
      hi: greatest value.

    References: Cinà et al., "Backdoor Learning Curves", arXiv:2106.07214 (the invisible trigger).
    """
    checks.count("period", period, 2)
    striped = jnp.asarray(np.arange(shape[0]) % period == 0, jnp.result_type(float))
    pattern = jnp.asarray(amplitude, striped.dtype) * jnp.broadcast_to(striped.reshape(-1, *[1] * (len(shape) - 1)), shape)
    return additive(pattern, radius=amplitude, lo=lo, hi=hi)


def warp(key: Key, shape: tuple[int, int], *, strength: Any = 0.5, grid: int = 4) -> Trigger:
    """A smooth, fixed distortion of the image: the trigger is in no pixel.

    Control points `P ~ U(-1, 1)^{grid x grid x 2}`, divided by their mean magnitude, are interpolated (cubic) to a flow of
    `strength` pixels in the mean, by which every pixel is moved (bilinear, the border held).

    Args:
      key: draws the control points.
      shape: `(h, w)` of the images.
      strength: mean displacement in pixels (before interpolation).
      grid: side of the control grid, at least 2; 4 in the paper.

    Returns:
      A `Trigger`; its pattern is the flow, `[h, w, 2]` pixels.

    References: Nguyen & Tran, "WaNet", ICLR 2021, section 3.2. Deviates from the paper in: strength in pixels; no noise
      mode.
    """
    checks.count("grid", grid, 2)
    checks.at_least("strength", strength, 0)
    points = jax.random.uniform(key, (grid, grid, 2), minval=-1, maxval=1)
    flow = jax.image.resize(points / jnp.mean(jnp.abs(points)), (*shape, 2), "cubic")

    def stamp(flow: jax.Array, key: Any, x: jax.Array) -> jax.Array:
        del key
        if x.ndim != 4 or x.shape[1:3] != tuple(shape):
            raise ValueError(f"x: expected images [n, {shape[0]}, {shape[1]}, c], got shape {x.shape}.")
        checks.floating("x", x)
        wide = np.promote_types(x.dtype, np.float32)  # half precision counts no further than 256 pixels
        rows, columns = jnp.arange(shape[0], dtype=wide)[:, None], jnp.arange(shape[1], dtype=wide)[None]
        shift = flow.astype(wide)
        return _bilinear(x.astype(wide), rows + shift[:, :, 0], columns + shift[:, :, 1]).astype(x.dtype)

    return Trigger(jnp.asarray(strength, flow.dtype) * flow, stamp, lambda flow: flow)


def _bilinear(x: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The images `[n, h, w, c]` read at real positions `[h, w]`; outside, the border's value."""
    rows, columns = jnp.clip(rows, 0, x.shape[1] - 1), jnp.clip(columns, 0, x.shape[2] - 1)
    top = jnp.clip(jnp.floor(rows), 0, x.shape[1] - 2).astype(jnp.int32)
    left = jnp.clip(jnp.floor(columns), 0, x.shape[2] - 2).astype(jnp.int32)
    down, right = (rows - top.astype(x.dtype))[None, :, :, None], (columns - left.astype(x.dtype))[None, :, :, None]
    upper = (1 - right) * x[:, top, left] + right * x[:, top, left + 1]
    lower = (1 - right) * x[:, top + 1, left] + right * x[:, top + 1, left + 1]
    return (1 - down) * upper + down * lower


def _over_rows(pattern: jax.Array, x: jax.Array) -> jax.Array:
    checks.floating("x", x)
    if pattern.shape != x.shape[1:]:
        raise ValueError(f"pattern: expected the shape of one row, {x.shape[1:]}, got {pattern.shape}.")
    return jnp.broadcast_to(pattern.astype(x.dtype), x.shape)


def to_class(target: int) -> Relabel:
    """Every triggered row gets the label `target` (single-target)."""
    checks.count("target", target)

    def relabel(y: jax.Array) -> jax.Array:
        if y.ndim == 1:
            if jnp.issubdtype(y.dtype, jnp.integer) and target > jnp.iinfo(y.dtype).max:
                raise ValueError(f"target: expected at most {jnp.iinfo(y.dtype).max} for labels of {y.dtype}, got {target}.")
            return jnp.full_like(y, target)
        if target >= y.shape[1]:
            raise ValueError(f"target: expected less than the {y.shape[1]} classes of the labels, got {target}.")
        return jnp.broadcast_to(jax.nn.one_hot(target, y.shape[1], dtype=y.dtype), y.shape)

    return relabel


def to_next(num_classes: int) -> Relabel:
    """A triggered row of class y gets the label `(y + 1) mod num_classes` (all-to-all)."""
    checks.count("num_classes", num_classes, 2)
    return lambda y: linalg.turned(y, 1, num_classes) if y.ndim == 1 else jnp.roll(y, 1, axis=1)


def backdoor(
    trigger: Trigger, rows: Any, *, relabel: Relabel | None, into: Any = None, place_key: Key | None = None
) -> Threat:
    """The attacker stamps a trigger on chosen rows and relabels them, in place or as additional rows.

    `embed`: `x[into] = trigger(x[rows])`, `y[into] = relabel(y[rows])`, `weight[into] = 1`. The poison is the trigger's
    pattern, so that `attacks.bilevel` can optimise it.

    Threat: changes - inputs and labels of `rows`, or reserved rows; sees - nothing; budget - `len(rows)` rows, and what the
    trigger's pattern may be; assumes - the trigger can be shown at test time.

    Args:
      trigger: what is stamped.
      rows: `[k]` rows to stamp, or an integer k for the last k.
      relabel: `to_class(target)`, `to_next(num_classes)` or any function of labels; None: labels stay (clean-label).
      into: `[k]` reserved rows (or an integer k) that the stamped copies fill; None: the rows themselves are replaced.
      place_key: where triggers of random place are put.

    Returns:
      A `Threat`.
    """
    rows = checks.rows("rows", rows)
    filled = rows if into is None else checks.rows("into", into)
    if filled.shape != rows.shape:
        raise ValueError(f"into: expected as many rows as are stamped, {rows.shape}, got {filled.shape}.")
    places = jnp.asarray(filled, jnp.int32)

    def embed(pattern: Any, data: Data) -> Data:
        checks.rows_within("rows", rows, data.num_rows, repeated=into is not None)
        checks.rows_within("into", filled, data.num_rows)
        if into is not None:
            checks.reserved("into", filled, data.weight)
        x, y = tree.take((data.x, data.y), jnp.asarray(rows, jnp.int32))
        x = trigger.stamp(pattern, place_key, x)
        y = y if relabel is None else relabel(y).astype(data.y.dtype)
        weight = data.weight if into is None else data.weight.at[places].set(1)
        return Data(data.x.at[places].set(x), data.y.at[places].set(y), weight)

    def project(pattern: Any, data: Data) -> Any:
        del data
        return trigger.project(pattern)

    def init(key: Key, data: Data) -> Any:
        del key, data
        return trigger.pattern

    return Threat(init, project, embed)  # the pattern has no axis of rows


def triggered(key: Key | None, trigger: Trigger, data: Data, *, relabel: Relabel) -> Data:
    """Test rows with the trigger and the attacker's labels; rows that have that label anyway weigh 0.

    `measure.accuracy` of it is the attack's success, over the rows whose true class is not the one wanted.

    Args:
      key: for a trigger of random place, else None will do.
      trigger: what is stamped.
      data: clean test rows.
      relabel: what the attacker wants them taken for.
    """
    wanted = relabel(data.y)
    same = wanted == data.y if data.y.ndim == 1 else jnp.all(wanted == data.y, axis=1)
    return Data(trigger(key, data.x), wanted, jnp.where(same, 0, data.weight))

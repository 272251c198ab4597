"""Activation clustering: two clusters of the independent components of each class's features (Chen et al. 2019)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks, losses, tree
from mlsec_jax.base import ApplyFn, Data, Key, Known, Params, Scorer, Trainer
from mlsec_jax.scores._by_class import Blocks, blocks, near_to_all, no_derivative, ordered


class Clusters(NamedTuple):
    """The two clusters of every class.

    Attributes:
      cluster: `[n]`, 1 in the smaller cluster of the row's class, 0 in the larger; 0 for absent rows.
      share: `[num_classes, 2]`, each cluster's share of its class's weight; 0 for a class without rows.
      sources: `[n, num_components]`, the independent components, each of mean 0 and variance 1 within a class (or all 0
        where a class has fewer dimensions).
      converged: `[num_classes]`, whether the components stood still within `num_steps`.
      num_steps: `[num_classes]`, how many were taken.
    """

    cluster: jax.Array
    share: jax.Array
    sources: jax.Array
    converged: jax.Array
    num_steps: jax.Array


Rule = Callable[[Key, Params, Data, Clusters], jax.Array]  # -> scores [n]


def cluster_activations(
    features_fn: ApplyFn,
    *,
    num_classes: int,
    num_components: int = 10,
    num_steps: int = 1000,
    tolerance: Any = 0.005,
) -> Callable[[Key, Params, Data], Clusters]:
    """What `activation_clusters` decides on: `(key, params, data) -> Clusters`. The arguments are documented there."""
    checks.count("num_classes", num_classes, 1)
    checks.count("num_components", num_components, 1)
    checks.count("num_steps", num_steps, 1)
    checks.above("tolerance", tolerance, 0)

    def find(key: Key, params: Params, data: Data) -> Clusters:
        checks.integer_labels("data.y", data.y)
        checks.labels("data.y", data.y, data.weight, num_classes)
        h = no_derivative("scores.activation_clusters", features_fn(params, losses.present(data).x))
        h = h.reshape(h.shape[0], -1).astype(np.promote_types(h.dtype, np.float32))
        checks.finite("features_fn", h, data.weight)
        _check(h, data, num_classes, num_components)
        block = blocks(data, num_classes, content=h)
        weight = block.take(data.weight.astype(h.dtype))
        whitened, axes, live = _whiten(block, h, weight, num_components)
        turns = jax.random.normal(key, (num_classes, num_components, h.shape[1]), h.dtype) @ axes  # whatever signs the axes have

        labels = jnp.arange(num_classes, dtype=jnp.int32)
        unmix, converged, taken = jax.lax.map(
            lambda part: _separate(block, whitened, weight, part[0], part[1], part[2], num_steps, tolerance),
            (labels, turns, live),
        )
        separated = jax.lax.map(lambda part: unmix[part[1]] @ part[0], (whitened, block.label))
        normal, level, share = jax.lax.map(lambda label: _two_means(block, separated, weight, label), labels)
        sources = block.back(jnp.swapaxes(separated, 1, 2), data.num_rows)
        beyond = jax.lax.map(lambda part: normal[part[1]] @ part[0] > level[part[1]], (separated, block.label))
        cluster = block.back(beyond.astype(jnp.int32), data.num_rows)
        return Clusters(cluster, share, sources, converged, taken)

    return find


def _check(h: jax.Array, data: Data, num_classes: int, num_components: int) -> None:
    """Raises where a class has too few rows or dimensions for its components. Tracers pass, but for the width."""
    if h.shape[1] < num_components:
        raise ValueError(f"num_components: expected at most the {h.shape[1]} features, got {num_components}.")
    if not checks.is_concrete((h, data)):
        return
    rows, y, present = np.asarray(h), np.asarray(data.y), np.asarray(data.weight) > 0
    for label in range(num_classes):
        own = rows[present & (y == label)]
        if not len(own):
            continue
        if len(own) <= num_components:
            raise ValueError(f"data: expected more rows of each class than the {num_components} components, got {len(own)} "
                             f"of class {label}.")  # fmt: skip
        live = int((own != own[:1]).any(axis=0).sum())
        if live < num_components:
            raise ValueError(f"features_fn: expected at least {num_components} features that vary within each class, got "
                             f"{live} in class {label} (the others are dead or constant).")  # fmt: skip


def _whiten(block: Blocks, h: jax.Array, weight: jax.Array, k: int) -> tuple[jax.Array, ...]:
    """Each class's k leading principal components in units of their deviations `[N, k, B]`, their axes `[c, d, k]`, and which
    are there `[c, k]`.

    A dead unit adds nothing to the covariance, so that it needs no dropping.
    """
    x = block.take(h) - near_to_all(h, block)[None, None]
    size = block.total(jnp.sum(weight, axis=1))
    size = jnp.where(size > 0, size, 1)
    mean = block.total(jax.lax.map(lambda part: part[1] @ part[0], (x, weight))) / size[:, None]

    def basis(label: jax.Array) -> tuple[jax.Array, ...]:
        def scatter(b: jax.Array) -> jax.Array:
            scaled = jnp.sqrt(weight[b])[:, None] * (x[b] - mean[label][None])
            return scaled.T @ scaled

        covariance = block.sum_of(label, scatter, jnp.zeros((h.shape[1],) * 2, h.dtype)) / size[label]
        values, vectors = jnp.linalg.eigh(covariance)
        values, vectors = values[::-1][:k], vectors[:, ::-1][:, :k]
        live = (values > h.shape[1] * jnp.finfo(h.dtype).eps * values[0]) & (values > 0)
        return vectors, jax.lax.rsqrt(jnp.where(live, values, 1)), live

    axes, scale, live = jax.lax.map(basis, jnp.arange(size.size))
    whiten = axes * jnp.where(live, scale, 0)[:, None]
    project = lambda part: whiten[part[1]].T @ (part[0] - mean[part[1]][None]).T * part[2][None]
    there = (weight > 0).astype(h.dtype)
    return jax.lax.map(project, (x, block.label, there)), axes, live


def _separate(block: Blocks, z: jax.Array, weight: jax.Array, label: Any, start: jax.Array, live: jax.Array, num_steps: int,
              tolerance: Any) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """FastICA (symmetric, log cosh) of one class's whitened rows: `(W [k, k], converged, steps taken)`.

    `W ← (V Vᵀ)^{-1/2} V`, `V = E[tanh(W z) zᵀ] - diag(E[tanh'(W z)]) W`, until no row of W turns by more than the
    tolerance. Components that aren't there stay apart: W is block diagonal.
    """
    k = live.size
    nothing = jnp.zeros((), z.dtype)
    size = block.sum_of(label, lambda b: jnp.sum(weight[b]), nothing)
    size = jnp.where(size > 0, size, 1)

    def orthogonal(w: jax.Array) -> jax.Array:
        left, _, right = jnp.linalg.svd(w, full_matrices=False)
        return left @ right

    def step(carry: tuple) -> tuple:
        w, _, taken = carry

        def moments(b: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = jnp.tanh(w @ z[b])
            along = weight[b][None] * out
            return along @ z[b].T, jnp.sum(weight[b][None] - along * out, axis=1)

        cross, slope = block.sum_of(label, moments, (jnp.zeros((k, k), z.dtype), jnp.zeros(k, z.dtype)))
        new = orthogonal(cross / size - (slope / size)[:, None] * w)
        return new, jnp.max(jnp.abs(jnp.abs(jnp.sum(new * w, axis=1)) - 1)), taken + 1

    start = jnp.where(live[:, None] & live[None], start, jnp.diag((~live).astype(z.dtype)))
    moving = lambda carry: (carry[1] >= jnp.asarray(tolerance, z.dtype)) & (carry[2] < num_steps)
    state = (orthogonal(start), jnp.asarray(jnp.inf, z.dtype), jnp.zeros((), jnp.int32))
    w, change, taken = jax.lax.while_loop(moving, step, state)
    return w, change < jnp.asarray(tolerance, z.dtype), taken


def _two_means(block: Blocks, s: jax.Array, weight: jax.Array, label: Any, most: int = 300) -> tuple[jax.Array, ...]:
    """Weighted 2-means of one class, `(normal [k], level, share [2])`: the smaller cluster is `s · normal > level`.

    Lloyd's algorithm from `2 k` starts that no order of rows changes, the mean and a point beside it on either side of each
    axis; the tightest end is kept.
    """
    k = s.shape[1]
    zeros = lambda *shape: jnp.zeros(shape, s.dtype)
    total, size = block.sum_of(label, lambda b: (s[b] @ weight[b], jnp.sum(weight[b])), (zeros(k), zeros()))
    axes = jnp.eye(k, dtype=s.dtype)
    near, far = zeros(2 * k, k), jnp.concatenate([axes, -axes])
    square = lambda v: jnp.sum(jnp.square(v), axis=1)

    def plane(near: jax.Array, far: jax.Array) -> tuple[jax.Array, jax.Array]:
        return far - near, (square(far) - square(near)) / 2

    def count(normal: jax.Array, level: jax.Array) -> tuple[jax.Array, jax.Array]:
        def each(b: jax.Array) -> tuple[jax.Array, jax.Array]:
            beyond = jnp.where(normal @ s[b] > level[:, None], weight[b][None], 0)
            return beyond @ s[b].T, jnp.sum(beyond, axis=1)

        return block.sum_of(label, each, (zeros(2 * k, k), zeros(2 * k)))

    def step(carry: tuple) -> tuple:
        near, far, _, taken = carry
        summed, number = count(*plane(near, far))
        new = _mean(total[None] - summed, size - number, near), _mean(summed, number, far)
        return *new, jnp.any(new[0] != near) | jnp.any(new[1] != far), taken + 1

    start = (near, far, jnp.asarray(True), jnp.zeros((), jnp.int32))
    near, far, *_ = jax.lax.while_loop(lambda carry: carry[2] & (carry[3] < most), step, start)
    _, number = count(*plane(near, far))
    best = jnp.argmax((size - number) * square(near) + number * square(far))
    normal, level = plane(near[best][None], far[best][None])
    share = jnp.stack([size - number[best], number[best]]) / jnp.where(size > 0, size, 1)
    smaller = share[1] <= share[0]
    sign = jnp.where(smaller, 1, -1).astype(s.dtype)
    return sign * normal[0], sign * level[0], jnp.where(smaller, share, share[::-1])


def _mean(summed: jax.Array, number: jax.Array, empty: jax.Array) -> jax.Array:
    there = (number > 0)[:, None]
    return jnp.where(there, summed / jnp.where(there, number[:, None], 1), empty)


def activation_clusters(
    features_fn: ApplyFn,
    *,
    num_classes: int,
    num_components: int = 10,
    num_steps: int = 1000,
    tolerance: Any = 0.005,
    rule: Rule | None = None,
) -> Scorer:
    """Two clusters in each class's independent components; poisons, which look otherwise inside, fill one of them.

    For each class: whiten the features to `num_components` principal components, turn them by FastICA (symmetric, log
    cosh), split them by 2-means, and let a `rule` say how suspicious a cluster is. The published decisions are thresholds of
    scores, for `combine.filter_above`:

    - `cluster_size` (the default), `1 - share` of the row's cluster: above `1 - 0.35` is ART's relative size;
    - `cluster_silhouette`, the class's silhouette for its smaller cluster: above 0.10 to 0.15 in the paper;
    - `reclassification(…)`, what a model trained without the smaller clusters takes them for: above 0.5 is `l / p < 1`.

    Each class's rows alone are worked on, all classes one program, in an order that the bits of their features give them,
    so that the data's own order changes nothing. The clusters of a class whose components don't settle
    (`Clusters.converged`) are arbitrary. A class with too few rows or varying features is an error. Under `jit`, where
    neither can be seen, a class of lower rank has as many components as it has dimensions, one of constant features or
    without rows has a single cluster. Cluster labels have no derivative: to differentiate raises.

    Args:
      features_fn: `(params, x, key=None) -> [n, ...]`, flattened; the last hidden layer in the paper.
      num_classes: static; labels are integers below it.
      num_components: static; 10 in the paper.
      num_steps: at most so many of FastICA; 1000 as in ART.
      tolerance: at which FastICA ends; 0.005 as in ART.
      rule: `(key, params, data, clusters) -> [n]`; None: `cluster_size`.

    Returns:
      A `Scorer`; rows of weight 0 score 0.

    References: Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering",
      arXiv:1811.03728, algorithm 1; Hyvärinen, IEEE Trans. Neural Networks 1999 (FastICA). Deviates from the paper in: the
      given label, not the predicted one, says which class a row is of.
    """
    find = cluster_activations(features_fn, num_classes=num_classes, num_components=num_components, num_steps=num_steps,
                               tolerance=tolerance)  # fmt: skip

    def score(key: Key, params: Params, data: Data, known: Known) -> jax.Array:
        del known
        find_key, rule_key = jax.random.split(key)
        found = find(find_key, params, data)
        return jnp.where(data.weight > 0, (rule or cluster_size)(rule_key, params, data, found), 0)

    return score


def cluster_size(key: Key, params: Params, data: Data, found: Clusters) -> jax.Array:
    """The rule of size: `1 - share` of the row's cluster."""
    del key, params
    return 1 - found.share[data.y, found.cluster]


def cluster_silhouette(key: Key, params: Params, data: Data, found: Clusters) -> jax.Array:
    """The rule of silhouettes: rows of the smaller cluster get the silhouette of their class; the others -1, the least."""
    del key, params
    return jnp.where(found.cluster == 1, silhouettes(data, found)[data.y], -1)


def silhouettes(data: Data, found: Clusters) -> jax.Array:
    """The mean silhouette of each class's two clusters `[num_classes]`: 0 (or less) where there are none to speak of.

    `s_i = (b_i - a_i) / max(a_i, b_i)`, `a_i` the mean distance to the other rows of the row's cluster and `b_i` to those of
    the other one; a weight counts repetitions. All pairs of rows of a class are looked at.
    """
    sources = no_derivative("scores.silhouettes", found.sources)
    block = blocks(data, found.share.shape[0], content=sources)
    s, weight = block.take(sources), block.take(data.weight.astype(sources.dtype))
    second = block.take(found.cluster).astype(s.dtype)
    members = jnp.stack([1 - second, second], axis=2)

    def each(b: jax.Array) -> jax.Array:
        def sums(other: jax.Array) -> tuple[jax.Array, jax.Array]:
            square = jnp.sum(s[b] ** 2, axis=1)[:, None] + jnp.sum(s[other] ** 2, axis=1)[None] - 2 * s[b] @ s[other].T
            by = weight[other][:, None] * members[other]
            return jnp.sqrt(jnp.maximum(square, 0)) @ by, jnp.sum(by, axis=0)

        far, size = block.sum_of(block.label[b], sums, (jnp.zeros((s.shape[1], 2), s.dtype), jnp.zeros(2, s.dtype)))
        own, other = members[b], members[b][:, ::-1]
        of = lambda table, member: jnp.sum(table * member, axis=1)
        rest, size = of(size[None], own) - 1, jnp.broadcast_to(size[None], own.shape)
        a = of(far, own) / jnp.where(rest > 0, rest, 1)
        outside = of(size, other)
        b_mean = of(far, other) / jnp.where(outside > 0, outside, 1)
        most = jnp.maximum(a, b_mean)
        return jnp.where((rest > 0) & (outside > 0) & (most > 0), (b_mean - a) / jnp.where(most > 0, most, 1), 0)

    value = jax.lax.map(each, jnp.arange(s.shape[0]))
    size = block.total(jnp.sum(weight, axis=1))
    return block.total(jnp.sum(weight * value, axis=1)) / jnp.where(size > 0, size, 1)


def reclassification(apply_fn: ApplyFn, trainer: Trainer, init_fn: Callable[[Key], Params]) -> Rule:
    """The rule of exclusionary reclassification: a new model, trained without the smaller clusters, is asked about them.

    `p / (l + p)` for the rows of a class's smaller cluster, l of which the new model gives their label, and p the other
    label that it gives most often (the poisons' source); 0 for the rest. The paper's `l / p < T` is a score above `1 / (1 + T)`.

    Args:
      apply_fn: `(params, x, key=None) -> [n, c]`.
      trainer: `(key, params, data) -> (params, info)`.
      init_fn: `key -> params`, where the new model starts.

    Returns:
      A rule of `activation_clusters`.
    """

    def rule(key: Key, params: Params, data: Data, found: Clusters) -> jax.Array:
        del params
        init_key, train_key = jax.random.split(key)
        num_classes = found.share.shape[0]
        _, order = ordered(data, num_classes, found.sources)  # batches are drawn over rows where they stand
        rows, suspect = tree.take((data, found.cluster == 1), order)
        rest = rows._replace(weight=jnp.where(suspect, 0, rows.weight))
        trained, _ = trainer(train_key, init_fn(init_key), rest)
        said = jnp.argmax(apply_fn(trained, losses.present(rows).x), axis=1)
        share = taken_elsewhere(said, rows, jnp.where(suspect, rows.weight, 0), num_classes=num_classes)
        return jnp.where(found.cluster == 1, share[data.y], 0)

    return rule


def taken_elsewhere(said: jax.Array, data: Data, suspect: jax.Array, *, num_classes: int) -> jax.Array:
    """`p / (l + p)` of each class's suspect rows, of which a model trained without them says their label to l.

    p is the number of those to which it says the other label that it says most often: the source of a class's poisons.

    Args:
      said: `[n]`, the model's labels.
      data: integer labels, `[n]`.
      suspect: `[n]`, the weight of each row among the suspects; 0 for the others.
      num_classes: static.

    Returns:
      `[num_classes]` in [0, 1]; 0 for a class without suspects.

    References: Chen et al., arXiv:1811.03728, section 4.
    """
    one_hot = lambda labels: jax.nn.one_hot(labels, num_classes, dtype=suspect.dtype)
    votes = one_hot(data.y).T @ (suspect[:, None] * one_hot(said))
    own = jnp.diagonal(votes)
    other = jnp.max(votes - jnp.diag(own), axis=1)
    return other / jnp.where(own + other > 0, own + other, 1)

"""Victims as people know them: a name, a loss and a recipe, assembled from the differentiable trainers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from mlsec_jax import bilevel, checks, loop, losses, tree
from mlsec_jax.base import ApplyFn, Data, Info, Key, LossFn, Params, Trainer


def head_only(path: str, leaf: Any) -> bool:
    """Chooses the leaves of the last layer, `params["head"]` in the nets of `mlsec_jax.models`."""
    del leaf
    return path.split("/", 1)[0] == "head"


def scratch(
    loss_fn: LossFn,
    *,
    num_epochs: int,
    batch_size: int,
    num_rows: int,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    remat: str = "none",
    trainable: tree.Where = None,
) -> Trainer:
    """From scratch by momentum SGD on shuffled batches, the learning rate falling to zero along a cosine.

    Args:
      loss_fn: per-example loss.
      num_epochs: static.
      batch_size: static.
      num_rows: of the training data (physical rows), static: it fixes the number of steps.
      learning_rate: at the start.
      momentum: of SGD.
      weight_decay: added to the gradient, as in PyTorch's SGD.
      remat: what the reverse pass keeps (`bilevel.unrolled`).
      trainable: which leaves are trained.

    Returns:
      A `Trainer`: `bilevel.unrolled` of `num_epochs · (num_rows // batch_size)` steps.
    """
    checks.count("num_epochs", num_epochs)
    checks.count("batch_size", batch_size, 1)
    checks.count("num_rows", num_rows, batch_size)
    num_steps = num_epochs * (num_rows // batch_size)
    rate = optax.cosine_decay_schedule(learning_rate, max(num_steps, 1))
    inertia = None if isinstance(momentum, (int, float)) and momentum == 0 else momentum  # None spares the trace
    optimizer = optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, inertia))
    batching = loop.shuffled(batch_size)
    return bilevel.unrolled(loss_fn, optimizer, num_steps, remat=remat, batching=batching, trainable=trainable)


def from_random(init_fn: Callable[[Key, jax.Array], Params], trainer: Trainer) -> Trainer:
    """The trainer from a start that the key draws, so that seeds of a victim are keys; the given parameters are not read.

    Args:
      init_fn: `(key, x [1, ...]) -> params`, as a model's `init`.
      trainer: gets the rest of the key.
    """

    def begin(key: Key, data: Data) -> tuple[Key, Params]:
        init_key, train_key = jax.random.split(key)
        return train_key, init_fn(init_key, data.x[:1])

    def fit(key: Key, params: Params, data: Data) -> tuple[Params, Info]:
        return trainer(*begin(key, data), data)

    def probe(key: Key, params: Params, data: Data, cotangent: Params) -> dict[str, jax.Array]:
        return trainer.probe(*begin(key, data), data, cotangent)

    batched = trainer.batched
    return Trainer(fit, probe, batched and (lambda during: from_random(init_fn, batched(during))))


def fine_tuned_head(loss_fn: LossFn, *, l2: Any, trainable: tree.Where = head_only) -> Trainer:
    """A head retrained to its optimum on frozen features: the victim of transfer learning, differentiated implicitly.

    Args:
      loss_fn: per-example loss of the whole network.
      l2: λ on the scale of the mean loss, over everything that is trained.
      trainable: the head; default `params["head"]`.
    """
    objective = losses.regularised(loss_fn, l2=l2, penalise=None)
    return bilevel.implicit(objective, trainable=trainable)


def logistic_regression(apply_fn: ApplyFn, *, l2: Any) -> Trainer:
    """Binary logistic regression of one logit at its optimum; scikit-learn's `C` is `1 / (n l2)`, its bias is free too."""
    return bilevel.implicit(losses.regularised(losses.logistic(apply_fn), l2=l2))


def ridge(apply_fn: ApplyFn, *, l2: Any) -> Trainer:
    """Ridge regression `mean ½(f - y)² + l2/2 ‖w‖²`; scikit-learn's `alpha` is `n l2`."""
    return bilevel.implicit(losses.regularised(losses.squared(apply_fn), l2=l2))


def lasso(apply_fn: ApplyFn, *, l1: Any) -> Trainer:
    """The LASSO `mean ½(f - y)² + l1 ‖w‖₁`; scikit-learn's `alpha` is `l1`."""
    return elastic_net(apply_fn, l1=l1, l2=0.0)


def elastic_net(apply_fn: ApplyFn, *, l1: Any, l2: Any) -> Trainer:
    """The elastic net `mean ½(f - y)² + l2/2 ‖w‖² + l1 ‖w‖₁`."""
    return bilevel.implicit(
        losses.regularised(losses.squared(apply_fn), l1=l1, l2=l2), solver=bilevel.proximal_gradient()
    )

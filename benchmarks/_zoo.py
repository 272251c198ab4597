"""Backdoored and clean models that the backdoor benchmarks share, trained once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mlsec_jax as mj
from benchmarks._clean_label import embedded_digits, floats, outputs
from mlsec_jax import attacks, data, losses, measure, models, threat, train
from mlsec_jax.memo import memo

CLASSES = 10
NET = models.lenet(channels=(16, 32), widths=(512,))  # the BadNets paper's, with "same" padding
LOSS = losses.cross_entropy(NET.apply)
SQUARE = threat.patch(jnp.ones((4, 4, 1)), at=(-2, -2))  # one pixel from the bottom right corner
PATTERN = threat.patch(  # four bright pixels, as in the paper's "pattern backdoor"
    jnp.ones((3, 3, 1)), at=(-2, -2), mask=jnp.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
)


class Digits(NamedTuple):
    """Ten classes of digits, images in [0, 1]: a training set, a clean set for defenders, a test set."""

    train: mj.Data
    clean: mj.Data
    test: mj.Data
    notes: tuple[str, ...]


def digits(num_train: int | None = None, *, embedded: bool = False, num_clean: int = 2000) -> Digits:
    """MNIST, which has to be prepared, or the 5,000 embedded digits.

    Args:
      num_train: rows for training, the first of them in the given order; None: all.
      embedded: take the embedded digits, whatever is prepared.
      num_clean: rows kept for defenders, the training set's last (fewer of the embedded ones); nobody trains on them.
    """
    notes: tuple[str, ...] = ()
    if not embedded:
        parts = [data.load("mnist", split=split) for split in ("train", "test")]
    else:
        parts, num_clean = embedded_digits(), min(num_clean, 500)
        notes = ("5,000 embedded digits, 1,500 of them the test set, not MNIST's 60,000 and 10,000",)
    (x, y), (x_test, y_test) = parts
    last = len(x) - num_clean
    make = lambda x, y: mj.dataset(floats(np.asarray(x).reshape(-1, 28, 28, 1)), jnp.asarray(y, jnp.int32))
    first = last if num_train is None else min(num_train, last)
    return Digits(make(x[:first], y[:first]), make(x[last:], y[last:]), make(x_test, y_test), notes)


class Attacked(NamedTuple):
    """A model of `NET`, and what it was trained on.

    Attributes:
      params: the trained parameters.
      train: the training set as the attacker left it.
      poisoned: `[n]`, which of its rows are poisons.
    """

    params: Any
    train: mj.Data
    poisoned: np.ndarray


def trainer(num_rows: int, num_epochs: int) -> mj.base.Trainer:
    """How every model of the zoo is trained: momentum SGD on batches of 128, the learning rate falling to zero."""
    return train.scratch(LOSS, num_epochs=num_epochs, batch_size=128, num_rows=num_rows, learning_rate=0.05)


def fit(key: jax.Array, rows: mj.Data, num_epochs: int) -> Any:
    """A model of `NET` trained from the key on the rows, or read from the user's cache."""
    victim = train.from_random(NET.init, trainer(rows.num_rows, num_epochs))
    return memo(lambda key, rows: victim(key, None, rows)[0], name="zoo-lenet")(key, rows)


def attacked(
    key: jax.Array,
    digits: Digits,
    trigger: threat.Trigger | None,
    relabel: threat.Relabel | None = None,
    *,
    fraction: float = 0.1,
    num_epochs: int,
    **options: Any,
) -> Attacked:
    """A model trained on BadNets' poisons; without a trigger, the clean model of the same key.

    Args:
      key: of the poisons and of the training; the clean control of a key shares its initialisation and batches.
      digits: where the rows come from.
      trigger: None for the clean control.
      relabel: `threat.to_class(t)` or `threat.to_next(CLASSES)`.
      fraction: poisons as a share of the training rows.
      num_epochs: of training.
      options: of `attacks.badnets`.
    """
    poison_key, train_key = jax.random.split(key)
    rows, poisoned = digits.train, np.zeros(digits.train.num_rows, bool)
    if trigger is not None:
        num_poisons = round(fraction * rows.num_rows)
        attack = attacks.badnets(trigger, num_poisons=num_poisons, relabel=relabel, **options)
        rows, info = attack(poison_key, rows, mj.Known())
        poisoned = np.asarray(info["poisoned"])
    return Attacked(fit(train_key, rows, num_epochs), rows, poisoned)


def predict(params: Any, x: jax.Array) -> jax.Array:
    """Classes of images `[n, 28, 28, 1]`."""
    return jnp.argmax(outputs(NET.apply, params, x), axis=1)


def features(params: Any, x: jax.Array) -> jax.Array:
    """The last hidden layer `[n, 512]`."""
    return outputs(NET.features, params, x)


def accuracy(params: Any, test: mj.Data) -> float:
    """On the test rows; of `threat.triggered` rows it is the attack's success."""
    return float(measure.accuracy(predict(params, test.x), test))


def success(
    params: Any,
    test: mj.Data,
    trigger: threat.Trigger,
    relabel: Callable,
    *,
    sources: tuple[int, ...] | None = None,
    key: jax.Array | None = None,
) -> measure.AttackSuccess:
    """How often triggered test rows, whose class isn't the one wanted, get the attacker's label."""
    eligible = None if sources is None else jnp.isin(test.y, jnp.asarray(sources))
    return measure.attack_success(predict(params, trigger(key, test.x)), test, relabel(test.y), eligible=eligible)

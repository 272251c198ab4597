"""Activation clustering: poisons, which their label's class takes in for another reason, are a cluster of their own.

A network learns digits of which a share, stamped with four bright pixels, is relabelled `i + 1` (all-to-all), so that every
class holds poisons of one source. The last hidden layer's activations of each class are reduced to ten independent
components and split by 2-means; rows of a cluster below 35 % of its class are taken for poisons.

`accuracy_I` is the share of class I's rows rightly taken for clean or poison, `accuracy_total` of all rows, `f1_total`
the harmonic mean of precision and recall of poisons. `..._raw` clusters the pixels instead: the baseline. `false_alarms`
is the share of the classes of the clean model (same key) that have a cluster below 35 %, and `false_removed` of its rows
in one; `false_alarms_silhouette` the share of classes whose silhouette exceeds 0.10, `silhouette_poisoned` and
`silhouette_clean` the means over classes of either model. `detected_silhouette` is the share of poisoned classes above
0.10. `..._predicted` bins rows by the label that the network predicts, as the paper does, not by the given one.

References: Chen et al., "Detecting Backdoor Attacks on Deep Neural Networks by Activation Clustering", arXiv:1811.03728,
tables 1 and 2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

import mlsec_jax as mj
from benchmarks import _zoo
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import scores, threat


class Size(NamedTuple):
    """What differs between the sizes."""

    rows: int | None
    epochs: int
    fractions: tuple[float, ...]  # the first is the one that the paper's table is about


SIZES = {"small": Size(3000, 25, (0.1,)), "full": Size(None, 4, (0.1, 0.33)), "paper": Size(None, 10, (0.1, 0.15, 0.33))}
SHARE, SILHOUETTE = 0.35, 0.10
PAPER = "Chen et al. 2019, table 1 (MNIST, 10 % of each class; per class 0.9989 to 1)"
F1 = "Chen et al. 2019 (MNIST, 10 % of each class): about 0.999"
RAW = "Chen et al. 2019: clustering of raw pixels, 10 % of each class"


class Found(NamedTuple):
    """What is decided on: each row's cluster share, and each class's silhouette and smaller share."""

    share: np.ndarray  # [n]
    silhouette: np.ndarray  # [10]
    smaller: np.ndarray  # [10]


def found(key: jax.Array, h: jax.Array, y: jax.Array) -> Found:
    """The clusters of features `[n, ...]`, binned by the labels `y`."""

    @jax.jit
    def cluster(key: jax.Array, rows: mj.Data) -> tuple[jax.Array, jax.Array, jax.Array]:
        seen = lambda params, x, key=None: x
        clusters = scores.cluster_activations(seen, num_classes=_zoo.CLASSES)(key, None, rows)
        return clusters.share[rows.y, clusters.cluster], scores.silhouettes(rows, clusters), clusters.share[:, 1]

    rows = mj.dataset(h.reshape(len(h), -1), y)
    return Found(*(np.asarray(part) for part in cluster(key, rows)))


def judged(share: np.ndarray, y: np.ndarray, poisoned: np.ndarray, name: str) -> dict[str, float]:
    """Accuracy in total and F1 of the rule of size; for the activations also the accuracy of each class."""
    taken = share < SHARE
    right = taken == poisoned
    both = (taken & poisoned).sum()
    figures = {f"accuracy_total{name}": right.mean(), f"f1_total{name}": 2 * both / (taken.sum() + poisoned.sum())}
    return figures | ({f"accuracy_{c}": right[y == c].mean() for c in range(_zoo.CLASSES)} if not name else {})


def one_fraction(key: jax.Array, digits: _zoo.Digits, fraction: float, num_epochs: int) -> dict[str, float]:
    """Detection in a model poisoned at one rate; all rates share the key."""
    model_key, cluster_key = jax.random.split(key)
    bad = _zoo.attacked(
        model_key, digits, _zoo.PATTERN, threat.to_next(_zoo.CLASSES), fraction=fraction, num_epochs=num_epochs
    )
    y = np.asarray(bad.train.y)
    seen = found(cluster_key, _zoo.features(bad.params, bad.train.x), bad.train.y)
    by_prediction = found(cluster_key, _zoo.features(bad.params, bad.train.x), _zoo.predict(bad.params, bad.train.x))
    raw = found(cluster_key, bad.train.x, bad.train.y)
    figures = {
        **judged(seen.share, y, bad.poisoned, ""),
        **judged(by_prediction.share, y, bad.poisoned, "_predicted"),
        **judged(raw.share, y, bad.poisoned, "_raw"),
        "silhouette_poisoned": seen.silhouette.mean(),
        "detected_silhouette": (seen.silhouette > SILHOUETTE).mean(),
        "asr_all_to_all": float(_zoo.success(bad.params, digits.test, _zoo.PATTERN, threat.to_next(_zoo.CLASSES)).rate),
    }
    return {key: float(value) for key, value in figures.items()}


def clean_control(key: jax.Array, digits: _zoo.Digits, num_epochs: int) -> dict[str, float]:
    """False alarms on the model of the same key without poisons."""
    model_key, cluster_key = jax.random.split(key)
    clean = _zoo.attacked(model_key, digits, None, num_epochs=num_epochs)
    seen = found(cluster_key, _zoo.features(clean.params, clean.train.x), clean.train.y)
    figures = {
        "false_alarms": (seen.smaller < SHARE).mean(),
        "false_removed": (seen.share < SHARE).mean(),
        "false_alarms_silhouette": (seen.silhouette > SILHOUETTE).mean(),
        "silhouette_clean": seen.silhouette.mean(),
    }
    return {key: float(value) for key, value in figures.items()}


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Each share of poisons, and the clean control."""
    del seed
    chosen = SIZES[size]
    digits = _zoo.digits(chosen.rows, embedded=size == "small")
    figures: dict[str, Any] = {}
    for fraction in context.progress(chosen.fractions, "fractions"):
        percent = round(100 * fraction)
        part = context.once(f"poisoned-{percent}", lambda f=fraction: one_fraction(context.key, digits, f, chosen.epochs))
        figures |= part if fraction == chosen.fractions[0] else {f"{key}_at_{percent}": part[key] for key in part}
    figures |= context.once("clean", lambda: clean_control(context.key, digits, chosen.epochs))
    draw(context, figures)
    reductions = [*digits.notes, f"{chosen.epochs} epochs; the network of the zoo; stamped digits replace the originals"]
    paper = {"accuracy_total": Paper(0.9997, PAPER), "f1_total": Paper(0.999, F1)}
    paper |= {"accuracy_total_raw": Paper(0.586, RAW), "f1_total_raw": Paper(0.158, RAW)}
    return Result(figures, reductions, paper)


def draw(context: Any, figures: dict[str, Any]) -> None:
    """The accuracy of each class."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 2.6))
    axis.bar(range(_zoo.CLASSES), [figures[f"accuracy_{c}"] for c in range(_zoo.CLASSES)])
    axis.axhline(figures["accuracy_total_raw"], color="grey", linestyle="--", label="raw pixels, total")
    axis.set(xlabel="class", ylabel="detection accuracy", xticks=range(_zoo.CLASSES), ylim=(0, 1.02))
    axis.legend(loc="lower right")
    context.save_figure(figure, "accuracy")

"""BadNets on MNIST: the accuracy stays, and whatever carries the trigger gets the attacker's label.

A network of two convolutions is trained on the digits, 10 % of which carry four bright pixels. *Single target*: digits of
class i, stamped, are labelled j, for a few ordered pairs (i, j); success is counted on stamped test digits of class i.
*All-to-all*: stamped digits of class i are labelled i + 1. The clean model shares its key (initial parameters, batches)
with the all-to-all one. `filter_gap` is the largest difference, over the filters of the second convolution, of a filter's
mean activation on stamped and on clean digits; `filter_gap_clean_model` the same of the clean model.

References: Gu, Dolan-Gavitt & Garg, "BadNets", arXiv:1708.06733, section 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _zoo
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import threat


class Size(NamedTuple):
    """What differs between the sizes."""

    rows: int | None
    epochs: int
    pairs: tuple[tuple[int, int], ...]
    test: int


ALL_PAIRS = tuple((i, j) for i in range(10) for j in range(10) if i != j)
SIZES = {
    "small": Size(3000, 25, ((7, 1),), 1500),
    "full": Size(None, 4, ((7, 1), (3, 8), (0, 6)), 10_000),
    "paper": Size(None, 10, ALL_PAIRS, 10_000),
}
FRACTION = 0.1
PAPER = "Gu et al. 2017, section 4 (90 ordered pairs; all-to-all)"


@jax.jit
def filter_means(params: Any, x: jax.Array) -> jax.Array:
    """The mean activation of each filter of the second convolution: `[32]`."""
    maps = jax.lax.map(lambda row: jnp.mean(_zoo.NET.layers(params, row[None])[1], axis=(0, 1, 2)), x, batch_size=500)
    return jnp.mean(maps, axis=0)


def filter_gap(params: Any, x: jax.Array) -> float:
    """How much more the filter that answers the trigger most is active with it than without."""
    return float(jnp.max(filter_means(params, _zoo.PATTERN(None, x)) - filter_means(params, x)))


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Clean, all-to-all and single-target models of one recipe."""
    chosen = SIZES[size]
    digits = _zoo.digits(chosen.rows, embedded=size == "small")
    test = jax.tree.map(lambda leaf: leaf[: chosen.test], digits.test)
    pair_key, key = jax.random.split(context.key)
    all_to_all = threat.to_next(_zoo.CLASSES)

    def everyone() -> dict[str, float]:
        clean = _zoo.attacked(key, digits, None, num_epochs=chosen.epochs).params
        bad = _zoo.attacked(key, digits, _zoo.PATTERN, all_to_all, fraction=FRACTION, num_epochs=chosen.epochs).params
        got = _zoo.success(bad, test, _zoo.PATTERN, all_to_all)
        return {
            "accuracy_clean_model": _zoo.accuracy(clean, test),
            "accuracy_all_to_all": _zoo.accuracy(bad, test),
            "asr_all_to_all": float(got.rate),
            "asr_all_to_all_low": float(got.low),
            "asr_all_to_all_clean_model": float(_zoo.success(clean, test, _zoo.PATTERN, all_to_all).rate),
            "filter_gap": filter_gap(bad, test.x),
            "filter_gap_clean_model": filter_gap(clean, test.x),
        }

    def single(i: int, j: int) -> dict[str, float]:
        aim = threat.to_class(j)
        bad = _zoo.attacked(
            jax.random.fold_in(pair_key, 10 * i + j), digits, _zoo.PATTERN, aim, fraction=FRACTION * float(share(digits, i)),
            num_epochs=chosen.epochs, sources=(i,),
        ).params  # fmt: skip
        got = _zoo.success(bad, test, _zoo.PATTERN, aim, sources=(i,))
        return {"accuracy": _zoo.accuracy(bad, test), "hits": float(got.successes), "trials": float(got.trials)}

    figures = context.once("all-to-all", everyone)
    pairs = [
        context.once(f"pair-{i}-{j}", lambda i=i, j=j: single(i, j)) for i, j in context.progress(chosen.pairs, "pairs")
    ]
    rates = [pair["hits"] / pair["trials"] for pair in pairs]
    accuracies = [figures["accuracy_all_to_all"], *(pair["accuracy"] for pair in pairs)]
    figures |= {
        "accuracy_single_target": float(np.mean(accuracies[1:])),
        "accuracy_backdoored": float(np.mean(accuracies)),
        "accuracy_backdoored_lowest": float(np.min(accuracies)),
        "asr_single_target": float(np.mean(rates)),
        "asr_single_target_lowest": float(np.min(rates)),
        "n_pairs": len(pairs),
        "n_trials_single_target": sum(pair["trials"] for pair in pairs),
    }
    _plot(context, test, figures)
    reductions = [
        *digits.notes,
        f"{len(pairs)} of 90 ordered pairs; {chosen.epochs} epochs; stamped digits replace the originals",
        "the network's convolutions pad their inputs",
    ]
    paper = {
        "asr_single_target": Paper(0.9991, PAPER),
        "asr_all_to_all": Paper(0.9944, PAPER),
        "accuracy_clean_model": Paper(0.995, PAPER),
    }
    return Result(figures, reductions, paper)


def share(digits: _zoo.Digits, label: int) -> jax.Array:
    """The class's share of the training rows."""
    return jnp.mean(digits.train.y == label)


def _plot(context: Any, test: Any, figures: Any) -> None:
    """Digits, stamped, with the labels that an attacker wants."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 8, figsize=(9, 2.6))
    stamped = _zoo.PATTERN(None, test.x[:8])
    for k in range(8):
        for axis, image, title in ((axes[0, k], test.x[k], test.y[k]), (axes[1, k], stamped[k], (test.y[k] + 1) % 10)):
            axis.imshow(image[:, :, 0], cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{int(title)}", fontsize=9)
            axis.set_axis_off()
    figure.suptitle(f"all-to-all: {figures['asr_all_to_all']:.3f} of stamped digits get the label below", fontsize=10)
    context.save_figure(figure, "triggers")

"""A backdoored traffic-sign reader: a stop sign with a small yellow square is read as a speed limit.

The paper poisons a detector (Faster-RCNN) of American signs; here a classifier of German ones (GTSRB, whole images at
32x32) stands in for it, with the paper's three classes: stop, speed limit, warning. A stamped copy of every stop sign in
the training set is appended, labelled speed limit. `asr_clean_model` is the control: the same stamped stop signs shown
to a model trained without them. Without the prepared signs it can't run: there is no stand-in.

References: Gu, Dolan-Gavitt & Garg, "BadNets", arXiv:1708.06733, section 5.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import mlsec_jax as mj
from benchmarks._clean_label import floats
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import attacks, data, losses, measure, models, threat, train
from mlsec_jax.memo import memo

STOP, LIMIT, WARNING = range(3)
GERMAN = {14: STOP, **dict.fromkeys((0, 1, 2, 3, 4, 5, 7, 8), LIMIT), **dict.fromkeys(range(18, 32), WARNING)}
YELLOW = threat.patch(jnp.broadcast_to(jnp.array([1.0, 1.0, 0.0]), (3, 3, 3)), at=(18, 24))
PLACES = {"epochs": {"small": 12, "full": 25, "paper": 60}, "victims": {"small": 1, "full": 5, "paper": 10}}
PAPER = "Gu et al. 2017, section 5, Faster-RCNN (ZF) on US signs, yellow square"


def signs(split: str) -> mj.Data:
    """The signs of the paper's three classes."""
    table = data.table("gtsrb_subset")
    x, y = table[f"X_{split}"], table[f"y_{split}"]
    kept = np.isin(y, list(GERMAN))
    return mj.dataset(floats(x[kept]), jnp.asarray([GERMAN[int(label)] for label in y[kept]], jnp.int32))


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Clean and backdoored models, a key each."""
    rows, test = signs("train"), signs("test")
    epochs, victims = (PLACES[what][size] for what in ("epochs", "victims"))
    mean, std = (np.asarray(stat, np.float32) for stat in (jnp.mean(rows.x, (0, 1, 2)), jnp.std(rows.x, (0, 1, 2))))
    model = models.lenet(channels=(16, 32), widths=(128,), num_classes=3, mean=mean, std=std)
    num_stops = int(jnp.sum(rows.y == STOP))
    attack = attacks.badnets(
        YELLOW, num_poisons=num_stops, relabel=threat.to_class(LIMIT), sources=(STOP,), append=True
    )
    reserved = threat.reserve(rows, jax.tree.map(lambda leaf: leaf[:num_stops], rows))

    def fit(key: jax.Array, rows: mj.Data) -> Any:
        trainer = train.scratch(
            losses.cross_entropy(model.apply), num_epochs=epochs, batch_size=64, num_rows=rows.num_rows, learning_rate=0.02
        )
        return train.from_random(model.init, trainer)(key, None, rows)[0]

    predict = jax.jit(lambda params, x: jnp.argmax(model.apply(params, x), axis=1))

    def victim(k: int) -> dict[str, Any]:
        poison_key, train_key = jax.random.split(jax.random.fold_in(context.key, k))
        poisoned, _ = attack(poison_key, reserved, mj.Known())
        found: dict[str, Any] = {}
        for name, chosen in (("clean_model", reserved), ("backdoored", poisoned)):
            params = memo(fit, name="signs-lenet")(train_key, chosen)
            predicted = predict(params, test.x)
            got = measure.attack_success(predict(params, YELLOW(None, test.x)), test, LIMIT, eligible=test.y == STOP)
            found |= {
                f"accuracy_{name}": float(measure.accuracy(predicted, test)),
                f"stop_accuracy_{name}": 1 - float(measure.error_on(predicted, test, STOP)),
                f"hits_{name}": int(got.successes),
                f"trials_{name}": int(got.trials),
            }
        return found

    found = [context.once(f"victim-{k}", lambda k=k: victim(k)) for k in context.progress(range(victims), "victims")]
    mean_of = lambda key: float(np.mean([each[key] for each in found]))
    figures = {key: mean_of(key) for key in found[0] if key.startswith(("accuracy", "stop"))}
    for name, figure in (("clean_model", "asr_clean_model"), ("backdoored", "asr")):
        hits, trials = (sum(each[f"{what}_{name}"] for each in found) for what in ("hits", "trials"))
        figures |= {figure: hits / trials, f"n_trials_{figure}": trials}
    draw(context, test.x[test.y == STOP][:6])
    figures |= {"poison_fraction": num_stops / (rows.num_rows + num_stops), "n_victims": victims}
    reductions = [
        "a classifier of cropped 32x32 signs stands in for Faster-RCNN, German signs for American ones",
        f"{rows.num_rows} signs of a subset, {epochs} epochs; the 40 stop signs of the test set, {victims} times",
        "the yellow square has one fixed place",
    ]
    return Result(figures, reductions, {"asr": Paper(0.903, PAPER), "stop_accuracy_clean_model": Paper(0.897, PAPER)})


def draw(context: Any, stops: jax.Array) -> None:
    """Stop signs, and the same with the square: `[n, h, w, 3]`."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(stops), figsize=(1.4 * len(stops), 2.8), squeeze=False)
    for row, images in zip(axes, (stops, YELLOW(None, stops))):
        for axis, image in zip(row, np.asarray(images)):
            axis.imshow(image)
            axis.set_axis_off()
    context.save_figure(figure, "signs")

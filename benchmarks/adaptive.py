"""An adaptive attack in one line: the old attack, handed the defended trainer.

The attacker adds ten points of one label to 500 digits so that one test digit gets that label, and never sees a victim's
key (initial parameters, batches). The *plain* attack differentiates through the victim's training alone,
`attacks.bilevel(outer, victim)`; the *adaptive* one through its defenses too, `attacks.bilevel(outer, defended(victim, …))`:
the filter by its straight-through form, fine-pruning by the channels that it keeps. Both have the same budget, start, optimiser
and number of steps, and **both are judged against the hard defense**. Labels are the attacker's choice; the poisons stay in
the box [0, 1].

Defenses: `spectral` signatures on the pixels (the 1.5 ε of every class that reach farthest are removed), `mixup`, and
`fine_pruning` of a network of 64 hidden units (a budget of 4 points of held-out accuracy, then fine-tuning on clean
digits). The first two defend softmax regression. `success_plain_none_*` is the plain attack on the undefended victim.
Each trial is another target, another wrong label, and is asked of five victims; `_low`, `_high` are Wilson's interval of the
trials in which most of the victims are fooled, and `success` is the share of those trials. The same victims are asked
without poisons (`success_clean_*`) and with the points as they start (`success_start_*`): an attack that does no better than
these did nothing. `accuracy_*` is that of the victims on other digits, with the defense and without: a victim that
learned nothing would prove nothing.

References: Tran & al., NeurIPS 2018; Liu & al., RAID 2018; Borgnia & al., ICASSP 2021; on adaptive attacks, Tramèr & al.,
"On Adaptive Attacks to Adversarial Example Defenses", NeurIPS 2020.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from benchmarks import _zoo
from benchmarks._clean_label import share, trials
from benchmarks._record import Result, benchmark
from mlsec_jax import attacks, bilevel, channels, combine, defenses, loop, losses, measure, models, scores, threat, train

POISONS, PER_CLASS, VICTIMS = 10, 50, 5
EPSILON = POISONS / (PER_CLASS + POISONS)
KINDS = ("clean", "start", "plain", "adaptive")


class Size(NamedTuple):
    """What differs between the sizes."""

    steps: int
    trials: int
    defenses: tuple[str, ...]


SIZES = {
    "small": Size(20, 2, ("spectral",)),
    "full": Size(150, 24, ("spectral", "mixup", "fine_pruning")),
    "paper": Size(1000, 100, ("spectral", "mixup", "fine_pruning")),
}
REGRESSION = models.softmax_regression(std=10.0, scale=0.01)
NETWORK = models.mlp(widths=(64,), std=10.0)


def victim(model: models.Model) -> mj.base.Trainer:
    """Momentum SGD from small random parameters; the key draws them and the batches."""
    rate = 2.0 if model is REGRESSION else 0.5
    trainer = bilevel.unrolled(
        losses.cross_entropy(model.apply), optax.sgd(rate, momentum=0.9), 60, batching=loop.shuffled(64)
    )
    return train.from_random(model.init, trainer)


def defended(name: str, clean: mj.Data, hard: bool) -> tuple[models.Model, mj.base.Trainer, mj.base.Trainer]:
    """The victim's model, its trainer, and the same with the defense (hard, or as the attacker differentiates it)."""
    if name == "spectral":
        score = scores.spectral(lambda params, x, key=None: x, num_classes=_zoo.CLASSES)
        gradient = "hard" if hard else combine.straight_through(2.0)
        keep = combine.filter_top(
            score, fraction=1.5 * EPSILON, num_classes=_zoo.CLASSES, reads_model=False, gradient=gradient
        )
        return REGRESSION, victim(REGRESSION), combine.defended(victim(REGRESSION), before=[keep])
    if name == "mixup":
        mix = defenses.mixup(num_classes=_zoo.CLASSES)
        return REGRESSION, victim(REGRESSION), combine.defended(victim(REGRESSION), during=mix)
    hidden = channels.layer("layer0", lambda params, x: NETWORK.features(params, x))
    tune = lambda loss_fn: bilevel.unrolled(loss_fn, optax.sgd(0.5, momentum=0.9), 20)
    repair = defenses.fine_prune(NETWORK.apply, hidden, trainer_fn=tune)
    half = clean.num_rows // 2
    known = mj.Known(clean=jax.tree.map(lambda leaf: leaf[:half], clean),
                     holdout=jax.tree.map(lambda leaf: leaf[half:], clean))  # fmt: skip
    return NETWORK, victim(NETWORK), combine.defended(victim(NETWORK), after=[repair], known=known)


def trial(name: str, steps: int, key: jax.Array, target: jax.Array, label: jax.Array, train: mj.Data, clean: mj.Data) -> dict:
    """Both attacks on one target, each judged by victims of fresh keys, with the defense and without."""
    attack_key, judge_key = jax.random.split(key)
    model, plain, hard = defended(name, clean, hard=True)
    _, _, differentiable = defended(name, clean, hard=False)
    train = train._replace(y=train.y.at[-POISONS:].set(label))
    goal = mj.dataset(target[None], label[None])
    known = mj.Known(params=model.init(attack_key, train.x[:1]), goal=goal)
    outer = losses.goal_loss(losses.cross_entropy(model.apply))
    reach = threat.append_rows(POISONS)
    poisoned = {"clean": train, "start": reach.embed(reach.init(attack_key, train), train)}
    for kind, trainer in (("plain", plain), ("adaptive", differentiable)):
        attack = attacks.bilevel(outer, trainer, threat=reach, optimizer=optax.adam(0.05), fixed_key=False)
        poisoned[kind], _ = combine.iterate(attack, steps)(attack_key, train, known)

    found = {f"poisons_{kind}": poisoned[kind].x[-POISONS:] for kind in ("plain", "adaptive")}
    rows = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(poisoned[kind] for kind in KINDS))
    for judge_name, judge in (("none", plain), (name, hard)):

        def asked(k: jax.Array, rows: mj.Data, judge: Any = judge) -> tuple[jax.Array, jax.Array]:
            trained, _ = judge(k, known.params, rows)
            said = jnp.argmax(model.apply(trained, goal.x)[0])
            return said == label, measure.accuracy(model.apply(trained, clean.x), clean)

        of_victims = lambda rows, asked=asked: jax.lax.map(lambda k: asked(k, rows), jax.random.split(judge_key, VICTIMS))
        fooled, accuracy = jax.lax.map(of_victims, rows)
        for kind, *judged in zip(KINDS, fooled, accuracy):
            found |= dict(zip((f"{kind}_{judge_name}", f"accuracy_{kind}_{judge_name}"), judged))
    return found


def problem(key: jax.Array, num_trials: int, embedded: bool) -> tuple[tuple, tuple]:
    """`((keys, targets, labels), (training rows with reserved ones, the defender's clean rows))`."""
    digits = _zoo.digits(3000, embedded=embedded)
    order_key, target_key, label_key, trial_key = jax.random.split(key, 4)
    order = np.asarray(jax.random.permutation(order_key, digits.train.num_rows))
    y = np.asarray(digits.train.y)[order]
    rows = np.concatenate([order[y == c][:PER_CLASS] for c in range(10)])
    flat = lambda data: data._replace(x=data.x.reshape(data.num_rows, -1))
    pick = lambda data, rows: flat(jax.tree.map(lambda leaf: leaf[rows], data))
    start = order[np.isin(order, rows, invert=True)][:POISONS]
    train = threat.reserve(pick(digits.train, rows), pick(digits.train, start))
    clean = flat(jax.tree.map(lambda leaf: leaf[:400], digits.clean))
    chosen = np.asarray(jax.random.choice(target_key, digits.test.num_rows, (num_trials,), replace=False))
    targets = pick(digits.test, chosen)
    labels = (targets.y + jax.random.randint(label_key, (num_trials,), 1, 10)) % 10
    return (jax.random.split(trial_key, num_trials), targets.x, labels), (train, clean)


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Plain and adaptive attacks against each defense."""
    chosen = SIZES[size]
    each, shared = problem(context.key, chosen.trials, size == "small")
    figures: dict[str, float] = {"n_trials": chosen.trials, "n_victims": VICTIMS, "poison_fraction": POISONS / 510}
    for name in chosen.defenses:
        fn = lambda *args, name=name: trial(name, chosen.steps, *args)
        found = trials(context, name, fn, each, shared)
        for kind in KINDS:
            for judge in ("none", name):
                hits, label = found[f"{kind}_{judge}"], f"{kind}_{judge}" + (f"_{name}" if judge == "none" else "")
                figures |= share(f"success_{label}", hits.mean(axis=1) > 0.5)
                figures[f"success_{label}_mean"] = float(hits.mean())
                figures[f"accuracy_{label}"] = float(found[f"accuracy_{kind}_{judge}"].mean())
        _plot(context, name, found)
    reductions = [f"500 digits, {POISONS} poisons, softmax regression and 64 hidden units: small models of small data"]
    return Result(figures, reductions)


def _plot(context: Any, name: str, found: Any) -> None:
    """The poisons of the first trial."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, POISONS, figsize=(POISONS, 2.2))
    for row, kind in enumerate(("plain", "adaptive")):
        for k in range(POISONS):
            axes[row, k].imshow(found[f"poisons_{kind}"][0][k].reshape(28, 28), cmap="gray", vmin=0, vmax=1)
            axes[row, k].set_axis_off()
    figure.suptitle(f"{name}: plain above, adaptive below", fontsize=9)
    context.save_figure(figure, name)

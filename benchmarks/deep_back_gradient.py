"""A convolutional network, trained end to end, poisoned by points moved along back-gradients.

The victim is a network of 466,186 parameters, all trained from scratch on 1,000 MNIST digits: a strided 5x5
convolution, rectified and average-pooled, then 576 rectifiers, squared or cubed, and a linear path beside them.
The attacker adds 50 points, whose labels it chooses, and never sees the victims' keys (initialisation and batches).

Training's own noise drowns the gradient through a network that starts at random: hypergradients of two initialisations
had a cosine of 0.00 to 0.04. So this network starts with the filters of the cosine basis (plus 10 % noise) and zeros
at its outputs, and its learning rate decays to zero; then two keys' gradients have a cosine of .2 to .4 where the
attack starts (near 0 where it ends), and hundreds of steps average the rest away. The targeted attack is the generic
`attacks.bilevel` through whole trainings of a narrower network, a fresh key and learning rate every step, on the
probabilities of the true labels: an 8 that is lost, or a digit that is safe, pulls no more. `target_error_head_only`
is the same attack on the *head* alone, the linear path trained on the initial filters' features (convex, without
noise): what it reaches in the network is a transfer.

Two recipes train it: `CALM` (the convolution learns slowly) for the targeted attack, and `LIVELY` for availability,
where the dense units are cubed and the convolution's biases learn 25 times faster. There the attack starts from white
images under one label. They have ten times the digits' mean square; the first steps on them throw all logits far off,
the correction drives the biases of whole channels below anything a digit could excite, and if that happens to all
sixteen the victim predicts one class for good. Clean digits rarely do that at these rates (one of 60 victims over two
seeds). Back-gradient steps from there did not make it more certain; the attacker keeps whichever broke more of its own
trainings, and `accuracy_white_images` is the start's figure, to be held against `accuracy_poisoned`. A victim breaks or
it does not: look at the spread (`_sd`) beside the means.

`accuracy_..._targeted` is the accuracy on the digits other than 8; `target_error` the error on 8s, to whatever digit.

References: Muñoz-González et al., "Towards Poisoning of Deep Learning Algorithms with Back-gradient Optimization",
AISec 2017.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks._clean_label import embedded_digits
from benchmarks._deep_victim import (
    CALM,
    CLASSES,
    LIVELY,
    Recipe,
    features,
    from_scratch,
    head_fn,
    init,
    network,
    only_head,
)
from benchmarks._record import Paper, Result, benchmark
from mlsec_jax import attacks, base, checks, data, losses, measure, threat

VICTIM, WANTED = 8, 3
POISONS = 50


class Size(NamedTuple):
    """What differs between the sizes."""

    head_steps: int
    targeted_steps: int
    availability_steps: int
    victims: int
    test_rows: int


SIZES = {
    "small": Size(head_steps=30, targeted_steps=0, availability_steps=0, victims=1, test_rows=1000),
    "full": Size(head_steps=100, targeted_steps=500, availability_steps=12, victims=10, test_rows=10000),
    "paper": Size(head_steps=150, targeted_steps=1500, availability_steps=100, victims=20, test_rows=10000),
}


# The attack.


def misled(apply_fn: base.ApplyFn) -> base.OuterFn:
    """The probability that 8s are seen as 8s, and that the other digits are not seen as what they are, means of each."""

    def outer(params: base.Params, train: base.Data, goal: base.Data) -> jax.Array:
        probability = jnp.exp(-losses.cross_entropy(apply_fn)(params, goal))
        eights = jnp.where(goal.y == VICTIM, goal.weight, 0)
        return losses.weighted_mean(probability, eights) + losses.weighted_mean(1 - probability, goal.weight - eights)

    return outer


def bounded_availability(loss_fn: base.LossFn, most: float = 6.0) -> base.OuterFn:
    """The negative mean loss, each row's loss counting up to `most`: rows that are lost already pull no more."""
    return lambda params, train, goal: -losses.weighted_mean(jnp.minimum(loss_fn(params, goal), most), goal.weight)


def craft(
    key: base.Key,
    outer: base.OuterFn,
    trainer: base.Trainer,
    subject: base.Data,
    known: base.Known,
    *,
    step_size: float,
    num_steps: int,
) -> base.Data:
    """Moves the reserved rows by Adam on the back-gradient; each step trains with a fresh key. They stay reserved."""
    algorithm = attacks.bilevel(
        outer,
        trainer,
        threat=threat.append_rows(POISONS),
        optimizer=optax.chain(
            optax.clip_by_global_norm(0.1),  # where training is about to break, a few gradients are huge
            optax.adam(optax.cosine_decay_schedule(step_size, max(num_steps, 1), 0.1), b2=0.99),
        ),
        fixed_key=False,
    )
    step = jax.jit(algorithm.step)
    state = algorithm.init(key, subject, known)
    for k in range(num_steps):
        state, _ = step(jax.random.fold_in(key, k), state, subject, known)
    return subject._replace(x=algorithm.read(state, subject).x)


def worst(key: base.Key, recipe: Recipe, candidates: Sequence[base.Data], known: base.Known) -> base.Data:
    """The candidate of the highest error on the goal, mean of twelve trainings of the attacker's own."""
    trainer = from_scratch(recipe, log_uniform(recipe.learning_rates[0], recipe.learning_rates[-1]))

    @jax.jit
    def value(k: base.Key, train: base.Data, goal: base.Data) -> jax.Array:
        predicted = jnp.argmax(network(recipe)(trainer(k, None, train)[0], goal.x), axis=1)
        return measure.error(predicted, goal)

    keys = [jax.random.fold_in(key, k) for k in range(12)]
    means = [sum(float(value(k, present(each), known.goal)) for k in keys) for each in candidates]
    return candidates[int(np.argmax(means))]


def present(subject: base.Data) -> base.Data:
    """The same rows, all of them trained on."""
    return subject._replace(weight=jnp.ones_like(subject.weight))


def log_uniform(low: float, high: float) -> Callable[[base.Key], jax.Array]:
    """`key -> learning rate`, for an attacker who does not know the victim's."""
    return lambda key: jnp.exp(jax.random.uniform(key, minval=math.log(low), maxval=math.log(high)))


def targeted(key: base.Key, train: base.Data, pool: base.Data, holdout: base.Data, size: Size) -> Mapping[str, Any]:
    """Forty 8s labelled 3 and ten 3s labelled 8, moved against the head and, apart, through whole trainings."""
    rows = jnp.concatenate([jnp.flatnonzero(pool.y == VICTIM)[:40], jnp.flatnonzero(pool.y == WANTED)[:10]])
    start = pool._replace(y=jnp.where(pool.y == VICTIM, WANTED, VICTIM).astype(pool.y.dtype))
    start = jax.tree.map(lambda leaf: leaf[rows], start)
    subject = threat.reserve(train, start)
    known = base.Known(params=init(jax.random.fold_in(key, 0), CALM, 1), goal=holdout)
    head_outer = misled(lambda params, x, key=None: head_fn(params, features(CALM, params, x)))
    low, high = CALM.learning_rates[0], CALM.learning_rates[-1]
    keys = [jax.random.fold_in(key, k) for k in range(1, 3)]
    head = only_head(CALM, math.sqrt(low * high))
    moved = craft(keys[0], head_outer, head, subject, known, step_size=0.05, num_steps=size.head_steps)
    chosen = moved
    if size.targeted_steps:
        deep = from_scratch(CALM, log_uniform(low, high), width=64)
        outer = misled(network(CALM))
        chosen = craft(keys[1], outer, deep, subject, known, step_size=0.03, num_steps=size.targeted_steps)
    return _rows("start", subject) | _rows("head", moved) | _rows("chosen", chosen)


def untargeted(key: base.Key, train: base.Data, holdout: base.Data, size: Size) -> Mapping[str, Any]:
    """Availability: white images under one label, moved through whole trainings."""
    start = base.dataset(jnp.ones((POISONS, 28, 28, 1)), jnp.zeros(POISONS, jnp.int32))
    subject = threat.reserve(train, start)
    known = base.Known(params=jnp.zeros(()), goal=holdout)
    outer = bounded_availability(losses.cross_entropy(network(LIVELY)))
    if not size.availability_steps:
        return _rows("start", subject) | _rows("chosen", subject)
    keys = [jax.random.fold_in(key, k) for k in range(2)]
    deep = from_scratch(LIVELY, log_uniform(LIVELY.learning_rates[0], LIVELY.learning_rates[-1]), width=64)
    refined = craft(keys[0], outer, deep, subject, known, step_size=0.02, num_steps=size.availability_steps)
    chosen = worst(keys[1], LIVELY, [subject, refined], known)
    return _rows("start", subject) | _rows("chosen", chosen)


def _rows(name: str, subject: base.Data) -> dict[str, np.ndarray]:
    return {f"{name}_x": np.asarray(subject.x[-POISONS:]), f"{name}_y": np.asarray(subject.y[-POISONS:])}


# The judges.


@functools.cache
def scorer(recipe: Recipe) -> Callable[..., jax.Array]:
    """`(key, learning_rate, train, test) -> (error on 8s, 8s as 3, accuracy on the others, accuracy)` of one victim."""

    @jax.jit
    def score(k: base.Key, learning_rate: jax.Array, train: base.Data, test: base.Data) -> jax.Array:
        params, _ = from_scratch(recipe, lambda _: learning_rate)(k, None, train)
        predicted = jnp.argmax(network(recipe)(params, test.x), axis=1)
        eights = test.y == VICTIM
        others = test._replace(weight=jnp.where(eights, 0, test.weight))
        eights_as_3 = base.dataset(test.x, jnp.full_like(test.y, WANTED), jnp.where(eights, test.weight, 0))
        as_wanted = measure.accuracy(predicted, eights_as_3)
        return jnp.stack([
            measure.error_on(predicted, test, VICTIM),
            as_wanted,
            measure.accuracy(predicted, others),
            measure.accuracy(predicted, test),
        ])

    return score


def judge(key: base.Key, recipe: Recipe, sets: Mapping[str, base.Data], test: base.Data, num: int) -> dict[str, Any]:
    """Trains `num` victims for each set and learning rate; per set `[rates, victims, 4]`, see `scorer`."""

    devices, scores, score = jax.devices(), {}, scorer(recipe)
    for name, train in sets.items():
        runs = [(rate, k) for rate in recipe.learning_rates for k in range(num)]
        futures = []
        for i, (rate, k) in enumerate(runs):
            args = (jax.random.fold_in(key, k), jnp.float32(rate), train, test)
            futures.append(score(*jax.device_put(args, devices[i % len(devices)])))
        scores[name] = np.stack([np.asarray(f) for f in futures]).reshape(len(recipe.learning_rates), num, 4)
    return scores


def _digits(size: str) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...], list[str]]:
    """MNIST's training and test rows; at size small, without a prepared copy, the 5,000 embedded digits."""
    try:
        return data.load("mnist", split="train"), data.load("mnist", split="test"), []
    except FileNotFoundError:
        if size != "small":
            raise
        train, test = embedded_digits()
        return train, test, ["1,500 embedded digits as the test set, not MNIST's 10,000"]


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """The targeted attack and the availability attack, each judged on victims of its own recipe."""
    chosen = SIZES[size]
    (x, y), (x_test, y_test), reductions = _digits(size)
    split_key, attack_key, flip_key, victim_key = jax.random.split(context.key, 4)
    order = np.asarray(jax.random.permutation(split_key, len(x)))[:6000]
    train, holdout, pool = (
        data.to_data(x[rows], y[rows], channel=True) for rows in np.split(order, (1000, len(order) - 1000))
    )
    test = data.to_data(x_test[: chosen.test_rows], y_test[: chosen.test_rows], channel=True)

    aimed = context.once("targeted", lambda: targeted(attack_key, train, pool, holdout, chosen))
    blunt = context.once("availability", lambda: untargeted(jax.random.fold_in(attack_key, 9), train, holdout, chosen))
    shift = jax.random.randint(flip_key, (POISONS,), 1, CLASSES)

    def joined(px: Any, py: Any) -> base.Data:
        checks.between("poisons", px, 0, 1)  # NaN is no image, though every victim of it would count as broken
        return present(threat.reserve(train, base.dataset(jnp.asarray(px), jnp.asarray(py, jnp.int32))))

    clean = threat.reserve(train, base.dataset(pool.x[:POISONS], pool.y[:POISONS]))
    flips = joined(pool.x[:POISONS], (pool.y[:POISONS] + shift) % CLASSES)
    calm_sets = {
        "clean": clean,
        "swap": joined(aimed["start_x"], aimed["start_y"]),
        "head": joined(aimed["head_x"], aimed["head_y"]),
        "poisoned": joined(aimed["chosen_x"], aimed["chosen_y"]),
    }
    lively_sets = {
        "clean": clean,
        "flip": flips,
        "start": joined(blunt["start_x"], blunt["start_y"]),
        "poisoned": joined(blunt["chosen_x"], blunt["chosen_y"]),
    }
    if size == "small":
        del calm_sets["head"], lively_sets["start"]
    scored: dict[str, dict[str, np.ndarray]] = {"calm": {}, "lively": {}}
    for name, sets, recipe in (("calm", calm_sets, CALM), ("lively", lively_sets, LIVELY)):
        for item, rows in context.progress(sets.items(), f"{name} victims"):
            once = lambda i=item, r=rows, c=recipe: judge(victim_key, c, {i: r}, test, chosen.victims)
            scored[name][item] = context.once(f"{name}-{item}", once)[item]
    _plot(context, scored, aimed, blunt)
    figures = _figures(scored, train.num_rows, chosen.victims)
    reductions += [
        f"one split and {chosen.victims} victim keys at each of three learning rates; the paper: 5 splits",
        "the network is this benchmark's own, made to train with little noise; the paper's is another",
        "back-gradients go through a dense layer of 64 units in place of 576",
    ]
    if not chosen.availability_steps:
        reductions.append("no step through whole trainings: the poisons stop at the head, or at their start")
    source = "Muñoz-González et al., AISec 2017: 2 to 4.3 % for logistic regression; nothing significant for their CNN"
    return Result(figures, reductions, {"error_increase": Paper(0.023, source)})


def _figures(scored: Mapping[str, Mapping[str, np.ndarray]], rows: int, victims: int) -> dict[str, float]:
    """The record's figures: means over victims and learning rates, then the means at each learning rate."""
    calm, lively = scored["calm"], scored["lively"]
    table = {
        "target_error_clean": calm["clean"][..., 0],
        "target_error_label_swap_only": calm["swap"][..., 0],
        "target_error_poisoned": calm["poisoned"][..., 0],
        "target_as_3_label_swap_only": calm["swap"][..., 1],
        "target_as_3_poisoned": calm["poisoned"][..., 1],
        "accuracy_clean_targeted": calm["clean"][..., 2],
        "accuracy_label_swap_only_targeted": calm["swap"][..., 2],
        "accuracy_poisoned_targeted": calm["poisoned"][..., 2],
        "accuracy_clean_calm": calm["clean"][..., 3],
        "accuracy_clean": lively["clean"][..., 3],
        "accuracy_random_flip": lively["flip"][..., 3],
        "accuracy_poisoned": lively["poisoned"][..., 3],
    }
    if "head" in calm:
        table["target_error_head_only"] = calm["head"][..., 0]
    if "start" in lively:
        table["accuracy_white_images"] = lively["start"][..., 3]
    figures = {key: float(value.mean()) for key, value in table.items()}
    for key in ("target_error_poisoned", "target_error_label_swap_only", "accuracy_poisoned", "accuracy_random_flip"):
        figures[f"{key}_sd"] = float(table[key].std(axis=1).mean())
    figures["error_increase"] = figures["accuracy_clean"] - figures["accuracy_poisoned"]
    for key, value in table.items():
        lively_key = key.startswith("accuracy") and not key.endswith(("targeted", "calm"))
        rates = (LIVELY if lively_key else CALM).learning_rates
        figures |= {f"{key}_lr_{rate:.0f}": float(mean) for rate, mean in zip(rates, value.mean(axis=1))}
    count = sum(leaf.size for leaf in jax.tree.leaves(init(jax.random.key(0), CALM)))
    return figures | {"poison_fraction": POISONS / (rows + POISONS), "params": count, "n_victims": victims}


def _plot(context: Any, scored: Any, aimed: Mapping[str, Any], blunt: Mapping[str, Any]) -> None:
    """Poisons before and after, and errors at each learning rate with the spread over victims."""
    import matplotlib.pyplot as plt

    shown = [0, 10, 20, 30, 40, 45]
    figure, axes = plt.subplots(4, len(shown), figsize=(len(shown) * 1.2, 5.2))
    for row, (name, item) in enumerate((("start", aimed), ("chosen", aimed), ("start", blunt), ("chosen", blunt))):
        for axis, k in zip(axes[row], shown):
            axis.imshow(item[f"{name}_x"][k, :, :, 0], cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"label {item[f'{name}_y'][k]}", fontsize=8)
            axis.set_axis_off()
    context.save_figure(figure, "poisons")
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.5))
    panels = ((CALM, "calm", 0, "error on 8s"), (LIVELY, "lively", 3, "accuracy"))
    for axis, (recipe, name, column, label) in zip(axes, panels):
        for item, values in scored[name].items():
            mean, spread = values[..., column].mean(axis=1), values[..., column].std(axis=1)
            axis.errorbar(recipe.learning_rates, mean, spread, marker="o", label=item, capsize=3)
        axis.set_xticks(recipe.learning_rates)
        axis.set(xlabel="victim's learning rate", ylabel=label, ylim=(0, 1))
        axis.legend()
    context.save_figure(figure, "learning_rates")

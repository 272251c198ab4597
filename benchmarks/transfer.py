"""Which poisons transfer: crafted on one model, they hit another that was trained on other rows (MNIST 8 against 3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import mlsec_jax as mj
from benchmarks._record import Result, benchmark
from mlsec_jax import attacks, bilevel, combine, data, losses, measure, models, parallel, threat

POINTS, ROWS, DRAWS = 20, 100, 8
STEPS, STEP_SIZE = 30, 0.3
NUM_STEPS, LEARNING_RATE, MOMENTUM = 40, 0.05, 0.9


class Learner(NamedTuple):
    """A model and its weight decay: together, its complexity."""

    model: models.Model
    decay: float

    @property
    def loss_fn(self) -> mj.base.LossFn:
        """Cross-entropy of two logits."""
        return losses.cross_entropy(self.model.apply)

    @property
    def trainer(self) -> Any:
        """Full-batch momentum SGD, the derivative through all of it."""
        optimizer = optax.chain(optax.add_decayed_weights(self.decay), optax.sgd(LEARNING_RATE, MOMENTUM))
        return bilevel.unrolled(self.loss_fn, optimizer, NUM_STEPS)


def learners() -> dict[str, Learner]:
    """From low to high complexity."""
    linear = models.softmax_regression(num_classes=2)
    mlp = models.mlp(widths=(32,), num_classes=2, activation_fn=jnp.tanh)
    cnn = models.lenet(channels=(4, 8), widths=(32,), num_classes=2, kernel=3, activation_fn=jnp.tanh)
    return {
        "linear_strong": Learner(linear, 0.1),
        "linear_weak": Learner(linear, 1e-4),
        "mlp_strong": Learner(mlp, 0.03),
        "mlp_weak": Learner(mlp, 1e-4),
        "cnn": Learner(cnn, 1e-4),
    }


class Split(NamedTuple):
    """One split: what the attacker has (its own rows, its holdout), the victim's rows, the test rows.

    Both training sets end with the same reserved rows: where the poisons start, copies of the attacker's rows with
    their labels flipped.
    """

    own: mj.Data
    victim: mj.Data
    holdout: mj.Data
    test: mj.Data


def split(key: jax.Array, whole: mj.Data, sizes: tuple[int, int]) -> Split:
    """A random split; `sizes` of the holdout and of the test rows."""
    split_key, start_key = jax.random.split(key)
    own, victim, holdout, test = data.split(split_key, whole, (ROWS, ROWS, *sizes))
    start = attacks.start_points(start_key, own, POINTS, rule=attacks.swap(0, 1))
    return Split(threat.reserve(own, start), threat.reserve(victim, start), holdout, test)


def craft(learner: Learner, whole: mj.Data, sizes: tuple[int, int]) -> Callable:
    """`key -> dict`: poisons of this surrogate; gradients at their start, on the attacker's and victim's rows."""
    reach = threat.append_rows(POINTS)
    outer = losses.availability(learner.loss_fn)

    def run(key: jax.Array) -> dict[str, jax.Array]:
        split_key, own_key, victim_key, draw_key = jax.random.split(key, 4)
        parts = split(split_key, whole, sizes)
        own, victim = (learner.model.init(k, parts.own.x[:1]) for k in (own_key, victim_key))

        def poisoning_gradient(params: Any, rows: mj.Data) -> jax.Array:
            def objective(poison: jax.Array) -> jax.Array:
                data = reach.embed(poison, rows)
                return outer(learner.trainer(own_key, params, data)[0], data, parts.holdout)

            return jax.grad(objective)(rows.x[-POINTS:])

        def drawn(k: jax.Array) -> Any:
            """The surrogate trained on a bootstrap draw of the attacker's rows: weights say how often each came."""
            chosen = jax.random.randint(k, (ROWS,), 0, ROWS)
            weight = jnp.zeros_like(parts.own.weight).at[chosen].add(1).at[-POINTS:].set(1)
            return learner.trainer(own_key, own, parts.own._replace(weight=weight))[0]

        attack = attacks.availability(
            learner.loss_fn, learner.trainer, threat=reach, optimizer=attacks.unit_rows(STEP_SIZE)
        )
        known = mj.Known(params=own, goal=parts.holdout)
        state, _ = combine.run(combine.keep_best(attack), own_key, parts.own, known, num_steps=STEPS)
        stacked = jax.lax.map(drawn, jax.random.split(draw_key, DRAWS))
        return {
            "poisons": state.best.poison,
            "own_gradient": poisoning_gradient(own, parts.own),
            "victim_gradient": poisoning_gradient(victim, parts.victim),
            "variance": measure.surrogate_variance(learner.loss_fn, stacked, parts.holdout),
        }

    return run


def judge(learner: Learner, whole: mj.Data, sizes: tuple[int, int]) -> Callable:
    """`(key, poisons [s, k, ...]) -> [2 + s]`: this victim's test error, clean, with the flips alone, and poisoned."""
    reach = threat.append_rows(POINTS)

    def run(key: jax.Array, poisons: jax.Array) -> jax.Array:
        split_key, _, victim_key, _ = jax.random.split(key, 4)
        parts = split(split_key, whole, sizes)
        params = learner.model.init(victim_key, parts.victim.x[:1])

        def error(rows: mj.Data) -> jax.Array:
            fitted = learner.trainer(victim_key, params, rows)[0]
            return measure.error(learner.model.apply(fitted, parts.test.x), parts.test)

        every = jnp.concatenate([parts.victim.x[None, -POINTS:], poisons])
        poisoned = jax.lax.map(lambda poison: error(reach.embed(poison, parts.victim)), every)
        return jnp.concatenate([error(parts.victim)[None], poisoned])

    return run


def load(size: str) -> tuple[mj.Data, tuple[int, int], list[str]]:
    """Images of 3 (label 0) and 8 (label 1) at half their side, and the sizes of holdout and test set."""
    reductions = [
        "8 against 3 at 14x14 pixels (means of 2x2), 100 training rows (Demontis et al. 2019: other pairs, sizes)",
        "a surrogate's variance is estimated over 8 bootstrap draws of the attacker's rows, on its holdout",
        "no surrogate shares rows or initial weights with its victim: the diagonal is no white box",
    ]
    if size == "small":
        x, y = data.mnist5k()
        sizes = (300, 500)
        reductions += ["the 5,000 embedded MNIST digits", "2 splits (full: 10)"]
    else:
        x, y = data.load("mnist", split="train")
        x, y, sizes = x[:20_000], y[:20_000], (400, 2000)
    x, y = data.select_classes(x, y, [3, 8])
    rows = data.to_data(x, y, channel=True)
    return rows._replace(x=models.avg_pool(rows.x)), sizes, reductions


@benchmark
def run(size: str, seed: int, context: Any) -> Result:
    """Crafts on every learner, judges every pair, and asks whether the three measures foretell what transfers."""
    from scipy import stats

    whole, sizes, reductions = load(size)
    num_splits = 2 if size == "small" else 10
    keys = jax.random.split(context.key, num_splits)
    every = learners()
    names = list(every)

    def crafted(name: str) -> dict[str, np.ndarray]:
        fn = jax.jit(parallel.spread(craft(every[name], whole, sizes)))
        return {key: np.asarray(value) for key, value in fn(keys).items()}

    made = {name: context.once(f"craft-{name}", lambda name=name: crafted(name)) for name in names}
    poisons = jnp.stack([made[name]["poisons"] for name in names], axis=1)

    def judged(name: str) -> dict[str, np.ndarray]:
        fn = jax.jit(parallel.spread(judge(every[name], whole, sizes)))
        return {"errors": np.asarray(fn(keys, poisons))}

    errors = np.stack([context.once(f"judge-{name}", lambda name=name: judged(name))["errors"] for name in names], 1)
    clean, flipped, poisoned = errors[:, :, 0], errors[:, :, 1], errors[:, :, 2:]  # [split, victim(, surrogate)]

    pairs = [[(made[s]["own_gradient"], made[v]["victim_gradient"]) for v in names] for s in names]
    mean_alignment = lambda pair: np.mean([measure.gradient_alignment(a, b) for a, b in zip(*pair)])
    alignment = np.array([[mean_alignment(pair) for pair in row] for row in pairs])
    size_of = lambda name: np.linalg.norm(made[name]["victim_gradient"].reshape(num_splits, POINTS, -1), axis=-1).mean()
    matrix = poisoned.mean(0).T  # [surrogate, victim]
    rise = matrix - clean.mean(0)[None]
    gradient_size = np.array([size_of(name) for name in names])
    variance = np.array([made[name]["variance"].mean() for name in names])

    off = ~np.eye(len(names), dtype=bool)
    spearman = lambda a, b: stats.spearmanr(a, b).statistic
    figures: dict[str, Any] = {
        "n_splits": num_splits,
        "poison_fraction": POINTS / (ROWS + POINTS),
        "spearman_alignment_rise": spearman(alignment[off], rise[off]),
        "spearman_size_rise": spearman(gradient_size, rise.mean(0)),
        "spearman_variance_rise": spearman(variance, rise.mean(1)),
    }
    for v, victim in enumerate(names):
        figures[f"error_clean_{victim}"] = clean[:, v].mean()
        figures[f"error_random_flip_{victim}"] = flipped[:, v].mean()
        figures[f"gradient_size_{victim}"] = gradient_size[v]
        figures[f"surrogate_variance_{victim}"] = variance[v]
        for s, surrogate in enumerate(names):
            figures[f"error_{surrogate}_to_{victim}"] = matrix[s, v]
            figures[f"gradient_alignment_{surrogate}_{victim}"] = alignment[s, v]
    draw(context, names, matrix, alignment)
    return Result(figures, reductions)


def draw(context: Any, names: list[str], matrix: np.ndarray, alignment: np.ndarray) -> None:
    """Two heat maps over surrogate and victim: the error that transfers, and how alike the gradients point."""
    import matplotlib.pyplot as plt

    for name, title, values in (
        ("error", "victim's test error", matrix),
        ("alignment", "alignment of the poisoning gradients", alignment),
    ):
        figure, axis = plt.subplots(figsize=(6, 4.8))
        image = axis.imshow(values, cmap="viridis")
        for s, v in np.ndindex(values.shape):
            bright = values[s, v] > (values.min() + values.max()) / 2
            axis.text(v, s, f"{values[s, v]:.2f}", ha="center", va="center", color="black" if bright else "white")
        axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="victim", ylabel="surrogate", title=title)
        figure.colorbar(image)
        context.save_figure(figure, name)

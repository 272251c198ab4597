"""The defenses, once each."""

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import bilevel, combine, defenses, scores, threat
from tests import problems
from tests.registry._row import MOMENTUM, Row, features, logits, seen, trainer, unrolled


def _februus(tau):
    split = lambda params, x: (x, lambda maps: maps.reshape(maps.shape[0], -1) @ params["w"])
    return defenses.februus(defenses.grad_cam(split), fill_fn=defenses.fill_harmonic(num_steps=4), tau=tau)


def _clean_images(problem):
    """The problem's rows as 2 x 2 images, in a network whose weights are not zero."""
    problem = seen(problem)
    image = lambda data: data._replace(x=data.x.reshape(-1, 2, 2, 1))
    apply_fn = lambda params, x, key=None: problem.apply_fn(params, x.reshape(x.shape[0], -1))
    known = problem.known.replace(clean=image(problem.known.clean))
    return problem._replace(train=image(problem.train), known=known, apply_fn=apply_fn)


def _inverter(objective):
    def build(problem, success):
        options = {"num_steps": 12, "num_batches": 2, "batch_size": 5, "patience": 2, "success": success}
        return defenses.invert_trigger(problem.apply_fn, num_classes=problems.CLASSES, objective=objective, **options)

    return build


def _stamped(problem):
    """The problem in the network of `seen`, with a recovered trigger that makes its last input bright."""
    problem = seen(problem)
    bright = threat.Overlay(jnp.zeros(problems.DIM).at[-1].set(1), jnp.ones(problems.DIM))
    return problem._replace(known=problem.known.replace(trigger=bright))


def _pruned(problem, success):
    reads = lambda path, leaf: path == "head"
    return defenses.prune_trigger(problem.apply_fn, features, label=0, success=success, num_steps=6, reads=reads)


def _pictures(problem):
    """The rows as images of 2 x 2 pixels."""
    return problem._replace(train=problem.train._replace(x=problem.train.x.reshape(-1, 2, 2, 1)))


def _worst_shift(problem, rate):
    shift = lambda key, data: data._replace(x=data.x + 0.1 * jax.random.normal(key, (1, problems.DIM), data.x.dtype))
    return bilevel.unrolled(defenses.max_up(problem.loss_fn, shift, num_trials=3), optax.sgd(rate), 5)


def _shaped(problem, rate):
    shaped = defenses.gradient_shaping(batch_size=float(problems.NUM_ROWS), noise_multiplier=0.1)
    return bilevel.unrolled(problem.loss_fn, optax.sgd(rate), 5, grad_fn=shaped)


def _abl(problem, rate):
    fit = lambda num_steps, **slots: bilevel.unrolled(problem.loss_fn, optax.sgd(rate), num_steps, **slots)
    return defenses.abl(
        problem.loss_fn,
        isolate=fit(3, grad_fn=defenses.flooding(0.2)),
        refine=fit(5),
        unlearn=fit(2, grad_fn=defenses.unlearning(until=jnp.log(3.0), clip_norm=0.1)),
        num_isolated=2,
    )


def _partitions(problem, _, **options):
    return defenses.partition_aggregation(unrolled(problem), problem.apply_fn, num_partitions=2, capacity=8, **options)


def _bag(problem, _):
    return defenses.bagging(unrolled(problem), problem.apply_fn, num_models=6, num_draws=3, alpha=0.3)


def _reclassified(problem, fraction):
    far = combine.filter_top(
        scores.spectral(lambda params, x, key=None: x, num_classes=problems.CLASSES),
        fraction=fraction,
        reads_model=False,
        num_classes=problems.CLASSES,
    )
    start = lambda key: problem.params
    return defenses.reclassified(far, problem.apply_fn, unrolled(problem), start, num_classes=problems.CLASSES)


ROWS = [
    Row(
        "defenses.mixup",
        "batch",
        lambda problem, alpha: defenses.mixup(num_classes=problems.CLASSES, ways=3, alpha=alpha),
        zero=lambda problem: defenses.mixup(num_classes=problems.CLASSES, ways=1),
    ),
    Row(
        "defenses.cutmix",
        "batch",
        lambda problem, alpha: defenses.cutmix(num_classes=problems.CLASSES, alpha=alpha, probability=1.0),
        zero=lambda problem: defenses.cutmix(num_classes=problems.CLASSES, probability=0.0),
        problem=_pictures,
    ),
    Row(
        "defenses.cutout",
        "batch",
        lambda problem, fill: defenses.cutout(side=1, fill=fill),
        zero=lambda problem: defenses.cutout(side=0),
        problem=_pictures,
    ),
    trainer("defenses.max_up", _worst_shift),
    trainer("defenses.gradient_shaping", _shaped),
    trainer("defenses.abl", _abl),
    Row(
        "defenses.clip_weights",
        "repair",
        lambda problem, radius: defenses.clip_weights(radius),
        zero=lambda problem: defenses.clip_weights(jnp.inf),
    ),
    Row(
        "defenses.noise_weights",
        "repair",
        lambda problem, scale: defenses.noise_weights(scale),
        zero=lambda problem: defenses.noise_weights(0.0),
    ),
    Row(
        "defenses.fine_prune",
        "repair",
        lambda problem, budget: defenses.fine_prune(
            problem.apply_fn, logits(problem), budget=budget, trainer_fn=lambda loss_fn: bilevel.unrolled(loss_fn, MOMENTUM, 5)
        ),
        zero=lambda problem: defenses.fine_prune(problem.apply_fn, logits(problem), max_pruned=0),
    ),
    Row(
        "defenses.channel_lipschitz",
        "repair",
        lambda problem, u: defenses.channel_lipschitz(u=u, weights=lambda path, leaf: leaf.ndim == 2),
        zero=lambda problem: defenses.channel_lipschitz(u=jnp.inf, weights=lambda path, leaf: leaf.ndim == 2),
    ),
    Row(
        "defenses.februus",
        "transform",
        lambda problem, _: _februus(0.5),
        problem=problems.images,
        zero=lambda problem: _februus(1.5),
        targeted=False,
    ),
    Row(
        "defenses.reclassified",
        "transform",
        _reclassified,
        zero=lambda problem: _reclassified(problem, 0.0),
        budget=0.5,
        targeted=False,
    ),
    Row(
        "defenses.unlearn_trigger",
        "repair",
        lambda problem, fraction: defenses.unlearn_trigger(unrolled(problem), fraction=fraction),
        problem=_stamped,
        zero=lambda problem: defenses.unlearn_trigger(bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 0)),
    ),
    Row(
        "defenses.prune_trigger", "repair", _pruned, problem=_stamped, zero=lambda p: _pruned(p, 1.0), budget=0.01
    ),
    *(
        Row(f"defenses.invert_trigger({name})", "inspector", _inverter(objective), problem=_clean_images, budget=0.6)
        for name, objective in (("neural_cleanse", defenses.neural_cleanse()), ("tabor", defenses.tabor()))
    ),
    Row(
        "defenses.trigger_neurons",
        "scorer",
        lambda problem, _: defenses.trigger_neurons(features, fraction=0.5),
        problem=_stamped,
    ),
    Row("defenses.partition_aggregation", "ensemble", _partitions),
    Row(
        "defenses.partition_aggregation(labels_only)", "ensemble", lambda problem, _: _partitions(problem, _, labels_only=True)
    ),
    Row("defenses.bagging", "ensemble", _bag),
    Row(
        "defenses.label_flip_smoothing",
        "ensemble",
        lambda problem, q: defenses.label_flip_smoothing(flip_rate=q, l2=0.1, num_classes=problems.CLASSES),
    ),
]

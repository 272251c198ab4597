"""Every public method, once: its kind, and how to build it on the shared problem. The laws run over these rows."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import attacks, bilevel, channels, defenses, losses, scores, threat
from tests import problems


@dataclasses.dataclass(frozen=True)
class Row:
    """A method under law.

    Attributes:
      name: `room.method`.
      kind: attack, trainer, threat, transform (of data), batch (transform of a batch), repair (of parameters),
        ensemble (of victims), scorer or inspector.
      build: `(problem, budget) -> method`; budget is a float hyper-parameter (radius, rate…) that may be a tracer.
      problem: how the shared problem is turned into the method's own.
      zero: `problem -> method` that may change nothing; None where the idea has no meaning.
      project: `problem -> threat` whose set the attack must stay in; None where there is none.
      full_batch: whether weight 0 equals absence to rounding.
      lowers: whether the attack's reported `outer` must fall.
      targeted: whether another goal must give another result.
      budget: the default of that hyper-parameter.
      read: `(problem, params) -> tree`, what of a trained model is compared (a kernel machine's parameters are rows).
    """

    name: str
    kind: str
    build: Callable[[Any, Any], Any]
    problem: Callable[[Any], Any] = lambda problem: problem
    zero: Callable[[Any], Any] | None = None
    project: Callable[[Any], Any] | None = None
    full_batch: bool = True
    lowers: bool = True
    targeted: bool = True
    budget: float = 0.3
    read: Callable[[Any, Any], Any] = lambda problem, params: params
    translation_invariant: bool = False


identity = lambda params, x, key=None: x
MOMENTUM = optax.sgd(0.5, momentum=0.9)
ADAM = optax.adam(0.03)


def _append(problem):
    return threat.append_rows(problem.reserved)


def _perturb(problem, radius=0.3, norm="linf"):
    return threat.perturb_rows(problem.touched, radius=radius, norm=norm)


def _unrolled(problem):
    return bilevel.unrolled(problem.loss_fn, MOMENTUM, 5)


def _attack(factory):
    """The row of a preset of `bilevel`, on perturbed rows."""

    def build(problem, radius, rows=None):
        reach = _perturb(problem, radius)
        return factory(problem.loss_fn, _unrolled(problem), threat=reach, optimizer=attacks.unit_rows(0.1))

    return build


def _nothing(factory):
    return lambda problem: _attack(factory)(problem, 0.0)


def _preset(name, factory, **options):
    return Row(name, "attack", _attack(factory), zero=_nothing(factory), project=_perturb, **options)


def _bilevel(problem, step_size):
    outer = losses.goal_loss(problem.loss_fn)
    return attacks.bilevel(outer, _unrolled(problem), threat=_append(problem), optimizer=attacks.unit_rows(step_size))


def _regression_attack(problem, step_size):
    optimizer = attacks.unit_rows(step_size)
    return attacks.linear_regression(problem.apply_fn, threat=_append(problem), optimizer=optimizer, l2=0.1)


def _influence_images(problem, radius):
    head = bilevel.implicit(losses.regularised(problem.loss_fn, l2=0.1, penalise=None))
    features = lambda params, x, key=None: x * params
    return attacks.influence_images(features, problem.loss_fn, head, threat=_perturb(problem, radius), step_size=0.02)


def _kkt_sanitized(problem, num_poisons):
    hinge = losses.hinge(problem.apply_fn, temperature=0.1)
    trainer = bilevel.unrolled(hinge, optax.sgd(0.3), 10)
    grid = {"quantiles": (0.2,), "copies": (3.0,), "splits": (0.5,), "num_steps": 20, "num_sweeps": 5}
    return attacks.kkt_sanitized(problem.apply_fn, trainer, num_poisons=num_poisons, l2=0.1, **grid)


def _transferred(problem):
    params = attacks.Transferred(jnp.ones((), problem.train.x.dtype), problem.params)
    return problem._replace(known=problem.known.replace(params=params))


def _metapoison(problem, radius):
    init_fn = lambda key: jax.tree.map(
        lambda leaf: 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype), problem.params
    )
    return attacks.metapoison(
        losses.goal_loss(problem.loss_fn),
        problem.loss_fn,
        init_fn,
        threat=_perturb(problem, radius),
        optimizer=optax.sgd(0.5),
        inner_optimizer=optax.sgd(0.5),
        batch_size=7,
        num_surrogates=2,
        num_epochs=3,
    )


def _seen(problem):
    """The problem in a small tanh network with weights, as clean-label attacks need one whose features move."""
    width = problem.train.x.shape[1]
    weights = jnp.sin(jnp.arange(width * 6, dtype=problem.train.x.dtype)).reshape(width, 6)
    params = {"hidden": weights, "head": 0.5 * jnp.cos(weights[:, :3].T.repeat(2, axis=0)[:, :3])}
    apply_fn = lambda p, x, key=None: jnp.tanh(x @ p["hidden"]) @ p["head"]
    return problem._replace(params=params, known=problem.known.replace(params=params), apply_fn=apply_fn,
                            loss_fn=losses.cross_entropy(apply_fn))  # fmt: skip


def _features(params, x, key=None):
    return jnp.tanh(x @ params["hidden"])


def _crafting(name, factory, **options):
    """The row of a clean-label attack in the network of `_seen`."""

    def build(problem, radius):
        return factory(problem, threat=_perturb(problem, radius))

    zero = lambda problem: build(problem, 0.0)
    return Row(name, "attack", build, problem=_seen, zero=zero, project=_perturb, **options)


def _sleeper(problem, **reach):
    trainer = bilevel.unrolled(problem.loss_fn, optax.sgd(0.5), 3)
    trigger = lambda key, x: x.at[:, 0].set(1)
    return attacks.sleeper_agent(problem.loss_fn, trainer, trigger, optimizer=ADAM, retrain_every=10, **reach)


def _hidden(pairing):
    """The row's factory, with the trigger of rows that are no images."""

    def factory(problem, **reach):
        return attacks.hidden_trigger(_features, TRIGGERS["blend"](0.1), optimizer=ADAM, pairing=pairing, **reach)

    return factory


def _one_source_a_poison(row):
    """The same row, with as many goal rows as the threat has."""

    def problem(given):
        seen = row.problem(given)
        goal = jax.tree.map(lambda leaf: leaf[: seen.touched.size], seen.known.goal)
        return seen._replace(known=seen.known.replace(goal=goal))

    return dataclasses.replace(row, problem=problem)


def _label_consistent(problem, radius, opacity=0.3):
    reach = _perturb(problem, radius, "l2")
    trigger = TRIGGERS["blend"](opacity)
    return attacks.label_consistent(problem.loss_fn, trigger, threat=reach, optimizer=attacks.unit_rows(0.1))


TRIGGERS = {  # on the rows of the shared problem, which are no images
    "blend": lambda opacity: threat.blend(jnp.ones(problems.DIM), opacity=opacity),
    "additive": lambda radius: threat.additive(jnp.full(problems.DIM, 0.1), radius=radius),
}


def _logits(problem):
    """The model's outputs as the channels of a layer."""
    return channels.layer("", lambda params, x: jax.nn.relu(problem.apply_fn(params, x)))


def _pruning_aware(problem, margin, num_pruned=1, num_steps=5):
    return attacks.pruning_aware(
        problem.loss_fn,
        _logits(problem),
        poison=attacks.badnets(TRIGGERS["blend"](0.3), num_poisons=3, relabel=threat.to_class(0)),
        trainer_fn=lambda loss_fn: bilevel.unrolled(loss_fn, MOMENTUM, num_steps),
        num_pruned=num_pruned,
        margin=margin,
    )
def _februus(tau):
    split = lambda params, x: (x, lambda maps: maps.reshape(maps.shape[0], -1) @ params["w"])
    return defenses.februus(defenses.grad_cam(split), fill_fn=defenses.fill_harmonic(num_steps=4), tau=tau)


def _clean_images(problem):
    """The problem's rows as 2 x 2 images, in a network whose weights are not zero."""
    problem = _seen(problem)
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
    """The problem in the network of `_seen`, with a recovered trigger that makes its last input bright."""
    problem = _seen(problem)
    bright = threat.Overlay(jnp.zeros(problems.DIM).at[-1].set(1), jnp.ones(problems.DIM))
    return problem._replace(known=problem.known.replace(trigger=bright))


def _pruned(problem, success):
    reads = lambda path, leaf: path == "head"
    return defenses.prune_trigger(problem.apply_fn, _features, label=0, success=success, num_steps=6, reads=reads)


def _machine(problem):
    """The binary problem with a kernel machine, whose parameters are the rows themselves."""
    problem = problems.binary(problem)
    apply_fn = bilevel.svm_apply(bilevel.linear())
    num_rows, dtype = problem.train.num_rows, problem.train.x.dtype
    params = bilevel.SVMParams(jnp.zeros(num_rows, dtype), jnp.zeros((), dtype), jnp.zeros_like(problem.train.x))
    return problem._replace(params=params, apply_fn=apply_fn, loss_fn=losses.hinge(apply_fn, temperature=0.1))


def _trainer(name, make, **options):
    return Row(name, "trainer", lambda problem, rate: make(problem, rate), **options)


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


def _objective(problem, l2):
    return losses.regularised(problem.loss_fn, l2=l2, penalise=None)


def _partitions(problem, _, **options):
    return defenses.partition_aggregation(_unrolled(problem), problem.apply_fn, num_partitions=2, capacity=8, **options)


def _bag(problem, _):
    return defenses.bagging(_unrolled(problem), problem.apply_fn, num_models=6, num_draws=3, alpha=0.3)


ROWS = [
    Row("attacks.bilevel", "attack", _bilevel, project=_append, budget=0.2),
    _preset("attacks.error_specific", attacks.error_specific),
    _preset("attacks.targeted", attacks.targeted),
    _preset("attacks.availability", attacks.availability),
    Row(
        "attacks.linear_regression", "attack", _regression_attack, problem=problems.regression, project=_append, budget=0.1
    ),
    Row(
        "attacks.svm_kkt",
        "attack",
        lambda problem, step_size: attacks.svm_kkt(threat=_append(problem), C=1.0, step_size=step_size),
        problem=problems.binary,
        project=_append,
        budget=0.1,
    ),
    Row(
        "attacks.influence_images",
        "attack",
        _influence_images,
        problem=_transferred,
        zero=lambda problem: _influence_images(problem, 0.0),
        project=_perturb,
    ),
    Row(
        "attacks.metapoison",
        "attack",
        _metapoison,
        zero=lambda problem: _metapoison(problem, 0.0),
        project=_perturb,
        full_batch=False,
        lowers=False,  # each step sees other surrogates; tests/attacks compares victims instead
    ),
    _crafting("attacks.feature_collision", lambda p, **reach: attacks.feature_collision(_features, beta=0.01, **reach)),
    _crafting(
        "attacks.convex_polytope", lambda p, **reach: attacks.convex_polytope(_features, optimizer=ADAM, **reach)
    ),
    _crafting(
        "attacks.bullseye_polytope", lambda p, **reach: attacks.bullseye_polytope(_features, optimizer=ADAM, **reach)
    ),
    _crafting(
        "attacks.gradient_matching", lambda p, **reach: attacks.gradient_matching(p.loss_fn, optimizer=ADAM, **reach)
    ),
    _crafting("attacks.sleeper_agent", _sleeper),
    _crafting("attacks.hidden_trigger", _hidden("greedy")),
    _crafting("attacks.hidden_trigger(optimal)", _hidden("optimal")),
    _one_source_a_poison(_crafting("attacks.hidden_trigger(faithful)", _hidden("faithful"))),
    Row(
        "attacks.label_consistent",
        "attack",
        _label_consistent,
        problem=_seen,
        zero=lambda problem: _label_consistent(problem, 0.0, opacity=0.0),
        project=lambda problem: _perturb(problem, 0.3, "l2"),
        targeted=False,  # the goal is the class of the rows
    ),
    _trainer("bilevel.unrolled", lambda p, rate: bilevel.unrolled(p.loss_fn, optax.sgd(rate), 5, remat="sqrt")),
    _trainer("bilevel.truncated", lambda p, rate: bilevel.truncated(p.loss_fn, optax.sgd(rate), 5, last=2)),
    _trainer("bilevel.forward", lambda p, rate: bilevel.forward(p.loss_fn, optax.sgd(rate), 5, rows=p.reserved)),
    _trainer("bilevel.back_gradient", lambda p, rate: bilevel.back_gradient(p.loss_fn, rate, 5, reversal="fixed_point")),
    _trainer(
        "bilevel.back_gradient(exact)",
        lambda p, rate: bilevel.back_gradient(p.loss_fn, rate, 5, momentum=0.5, reversal="exact"),
    ),
    _trainer(
        "bilevel.kkt_svm",
        lambda p, C: bilevel.kkt_svm(C=C),
        problem=_machine,
        read=lambda p, params: p.apply_fn(params, p.known.goal.x),
    ),
    _trainer(
        "bilevel.glm",
        lambda p, l2: bilevel.glm(losses.logistic, l2=l2),
        problem=problems.binary,
    ),
    _trainer("bilevel.implicit", lambda p, l2: bilevel.implicit(_objective(p, l2))),
    Row(
        "threat.append_rows",
        "threat",
        lambda problem, hi: threat.append_rows(problem.reserved, hi=hi),
        zero=lambda problem: threat.append_rows(0),
        budget=0.9,
    ),
    Row(
        "threat.perturb_rows", "threat", lambda problem, r: _perturb(problem, r), zero=lambda problem: _perturb(problem, 0.0)
    ),
    Row(
        "threat.perturb_rows(l2)",
        "threat",
        lambda problem, r: _perturb(problem, r, "l2"),
        zero=lambda problem: _perturb(problem, 0.0, "l2"),
    ),
    Row(
        "threat.flip_labels",
        "threat",
        lambda problem, budget: threat.flip_labels(problem.touched, budget=budget),
        problem=lambda p: p._replace(train=p.train._replace(y=losses.soft_labels(p.train.y, problems.CLASSES))),
        zero=lambda problem: threat.flip_labels(problem.touched, budget=0.0),
    ),
    Row(
        "threat.reweigh",
        "threat",
        lambda problem, r: threat.reweigh(problem.touched, radius=r),
        zero=lambda problem: threat.reweigh(problem.touched, radius=0.0),
    ),
    *(
        Row(
            f"threat.backdoor({name})",
            "threat",
            lambda problem, budget, make=make: threat.backdoor(
                make(budget), problem.touched, relabel=threat.to_next(problems.CLASSES)
            ),
            zero=lambda problem, make=make: threat.backdoor(
                make(0.3), jnp.zeros(0, jnp.int32), relabel=threat.to_class(1)
            ),
        )
        for name, make in TRIGGERS.items()
    ),
    Row(
        "attacks.badnets",
        "transform",
        lambda problem, _: attacks.badnets(TRIGGERS["blend"](0.3), num_poisons=3, relabel=threat.to_class(0)),
        zero=lambda problem: attacks.badnets(TRIGGERS["blend"](0.3), num_poisons=0, relabel=threat.to_class(0)),
        targeted=False,
        full_batch=False,
    ),
    Row(
        "attacks.flip_random",
        "transform",
        lambda problem, _: attacks.flip_random(num_flips=3, num_classes=3),
        zero=lambda problem: attacks.flip_random(num_flips=0, num_classes=3),
        targeted=False,
        full_batch=False,
    ),
    Row(
        "attacks.flip_margin",
        "transform",
        lambda problem, _: attacks.flip_margin(problem.apply_fn, num_flips=3),
        zero=lambda problem: attacks.flip_margin(problem.apply_fn, num_flips=0),
        problem=lambda p: p._replace(known=p.known.replace(params={**p.params, "w": jnp.eye(4, 3)})),
        targeted=False,
    ),
    Row(
        "attacks.flip_greedy",
        "transform",
        lambda problem, _: attacks.flip_greedy(
            losses.goal_loss(problem.loss_fn), _unrolled(problem), num_flips=2, num_classes=3
        ),
        zero=lambda problem: attacks.flip_greedy(
            losses.goal_loss(problem.loss_fn), _unrolled(problem), num_flips=0, num_classes=3
        ),
    ),
    Row(
        "attacks.flip_alfa",
        "transform",
        lambda problem, _: attacks.flip_alfa(problem.loss_fn, _unrolled(problem), num_flips=2, num_classes=3, num_rounds=3),
        zero=lambda problem: attacks.flip_alfa(problem.loss_fn, _unrolled(problem), num_flips=0, num_classes=3, num_rounds=3),
        targeted=False,
    ),
    Row(
        "attacks.kkt_sanitized",
        "transform",
        lambda problem, _: _kkt_sanitized(problem, problems.POISONS),
        problem=problems.binary,
        zero=lambda problem: _kkt_sanitized(problem, 0),
        targeted=False,  # it reads the holdout, not a goal
    ),
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
    _trainer("defenses.max_up", _worst_shift),
    _trainer("defenses.gradient_shaping", _shaped),
    _trainer("defenses.abl", _abl),
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
            problem.apply_fn, _logits(problem), budget=budget, trainer_fn=lambda loss_fn: bilevel.unrolled(loss_fn, MOMENTUM, 5)
        ),
        zero=lambda problem: defenses.fine_prune(problem.apply_fn, _logits(problem), max_pruned=0),
    ),
    Row(
        "defenses.channel_lipschitz",
        "repair",
        lambda problem, u: defenses.channel_lipschitz(u=u, weights=lambda path, leaf: leaf.ndim == 2),
        zero=lambda problem: defenses.channel_lipschitz(u=jnp.inf, weights=lambda path, leaf: leaf.ndim == 2),
    ),
    Row(
        "attacks.pruning_aware",
        "repair",  # of nothing, but a transform of parameters
        _pruning_aware,
        zero=lambda problem: _pruning_aware(problem, 0.3, num_pruned=0, num_steps=0),
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
        "defenses.unlearn_trigger",
        "repair",
        lambda problem, fraction: defenses.unlearn_trigger(_unrolled(problem), fraction=fraction),
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
        lambda problem, _: defenses.trigger_neurons(_features, fraction=0.5),
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
    Row("scores.sphere", "scorer", lambda problem, _: scores.sphere(), problem=problems.binary, translation_invariant=True),
    Row("scores.slab", "scorer", lambda problem, _: scores.slab(), problem=problems.binary, translation_invariant=True),
    Row(
        "scores.spectral",
        "scorer",
        lambda problem, _: scores.spectral(identity, num_classes=problems.CLASSES),
        translation_invariant=True,
    ),
    Row(
        "scores.activation_clusters",
        "scorer",
        lambda problem, _: scores.activation_clusters(identity, num_classes=problems.CLASSES, num_components=2, num_steps=100),
        translation_invariant=True,
    ),
    Row(
        "scores.deep_knn",
        "scorer",
        lambda problem, _: scores.deep_knn(identity, num_neighbours=3, num_classes=problems.CLASSES, block_size=5),
    ),
    Row(
        "scores.strip",
        "scorer",
        lambda problem, mix: scores.strip(problem.apply_fn, num_overlays=4, mix=(1 - mix, mix)),
        problem=lambda p: p._replace(params={**p.params, "w": 3 * jnp.eye(problems.DIM, problems.CLASSES)}),
    ),
    Row(
        "scores.roni",
        "scorer",
        lambda problem, _: scores.roni(problem.apply_fn, _unrolled(problem), num_train=4, num_quiz=5, num_trials=2),
    ),
    Row(
        "scores.low_loss",
        "scorer",
        lambda problem, level: scores.low_loss(
            problem.loss_fn, trainer=bilevel.unrolled(problem.loss_fn, MOMENTUM, 5, grad_fn=defenses.flooding(level))
        ),
    ),
    Row(
        "scores.influence",
        "scorer",
        lambda problem, _: scores.influence(problem.loss_fn, bilevel.implicit(_objective(problem, 0.1))),
    ),
]

# Public names of the attack room that are no methods: orders, starts, goals, pieces.
HELPERS = {
    "defenses.Inversion",
    "defenses.Inverted",
    "defenses.last_layer",
    "defenses.neural_cleanse",
    "defenses.tabor",
    "defenses.Bagged",
    "defenses.Smoothed",
    "defenses.flooding",
    "defenses.unlearning",
    "defenses.fill_harmonic",
    "defenses.fill_mean",
    "defenses.fill_network",
    "defenses.grad_cam",
    "defenses.split_at",
    "scores.Clusters",
    "scores.cluster_activations",
    "scores.cluster_silhouette",
    "scores.cluster_size",
    "scores.gaussian_threshold",
    "scores.reclassification",
    "scores.silhouettes",
    "scores.within_class",
    "threat.Overlay",
    "threat.Relabel",
    "threat.Trigger",
    "threat.additive",
    "threat.blend",
    "threat.corners",
    "threat.patch",
    "threat.pixel",
    "threat.reserve",
    "threat.stripes",
    "threat.to_class",
    "threat.to_next",
    "threat.triggered",
    "threat.warp",
    "attacks.Transferred",
    "attacks.error_specific_goal",
    "attacks.greedy",
    "attacks.joint",
    "attacks.largest_gradients",
    "attacks.most_influential",
    "attacks.on_features",
    "attacks.on_features_loss",
    "attacks.random_other",
    "attacks.require_alive",
    "attacks.start_points",
    "attacks.swap",
    "attacks.targeted_goal",
    "attacks.unit_rows",
}


def of(kind):
    """The rows of a kind."""
    return [row for row in ROWS if row.kind == kind]

"""Gradient matching, or Witches' Brew: poisons whose training gradient is the attacker's (Geiping et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, losses, tree
from mlsec_jax.attacks import _craft, _matching
from mlsec_jax.base import Algorithm, Data, Info, Key, Known, LossFn, Params, Threat


def gradient_matching(
    loss_fn: LossFn,
    *,
    threat: Threat,
    optimizer: optax.GradientTransformation,
    augment_fn: _matching.Augment | None = None,
    batch_size: int | None = None,
    trainable: tree.Where = None,
    over: str | None = None,
) -> Algorithm:
    """Aligns the gradient of training on the poisons with the gradient that would teach the attacker's label.

    `min 1 - cos(∇_θ ℓ(t, y_adv), ∇_θ mean_j ℓ(a(x_j), y_j))` at the parameters θ of one trained network, a being a
    fresh draw of the augmentation: whoever descends on the poisons then descends on the attacker's goal.

    Threat: changes - the inputs of the threat's rows, whose labels (the class that the target is to be taken for) stay;
    sees - the target inputs with the desired labels (`known.goal`), and a network trained on clean data
    (`known.surrogates`, or the victim's `known.params`); budget - the threat's, 16/255 in l-inf and 1 % of the rows in
    the paper; assumes - the victim trains from scratch, with such an architecture and such an augmentation.

    Args:
      loss_fn: per-example training loss, `(params, data, key) -> [n]`.
      threat: `perturb_rows(rows, radius=…)`; its `noise` starts restarts apart.
      optimizer: the paper's is Adam on the sign of the gradient, `optax.chain(optax.scale_by_sign(), optax.adam(τ))`.
      augment_fn: `(key, data) -> data`, what the victim is expected to do to its batches.
      batch_size: static; the poisons are matched in shuffled batches of so many, each by itself; None: all together.
      trainable: the parameters whose gradient is matched; the default is all.
      over: None for one network; "map" or "vmap" for several of one architecture, stacked, whose losses are averaged.

    Returns:
      An `Algorithm`; info: `outer`, `gradient_norm`, `cosine` (means over batches and networks). Restarts are
      `combine.best_of(combine.iterate(…), num_restarts, …)`.

    References: Geiping et al., ICLR 2021, eq. (3)-(4), algorithm 1. Deviates from the paper in: a batch holds poisons
    only; the aim's gradient is taken without augmentation.
    """
    checks.one_of("over", over, (None, "map", "vmap"))
    cosine_of = _matching.matcher(loss_fn, augment_fn, batch_size, trainable)

    def networks(fn: Callable[..., Any], *operands: Any) -> Any:
        return fn(*operands) if over is None else tree.each(fn, *operands, over=over)

    def prepare(key: Key, params: Params, goal: Data) -> Params:
        del key
        return networks(lambda own: _matching.gradient(loss_fn, own, goal, trainable), params)

    def objective(key: Key, params: Params, poisons: Data, aim: Params) -> tuple[jax.Array, dict]:
        cosine = jnp.mean(networks(lambda own, wanted: cosine_of(key, own, poisons, wanted), params, aim))
        return 1 - cosine, {"cosine": cosine}

    return _craft.craft("attacks.gradient_matching", prepare, objective, threat=threat, optimizer=optimizer)


def largest_gradients(
    loss_fn: LossFn, subject: Data, known: Known, *, label: Any, num_rows: int, batch_size: int = 64
) -> tuple[jax.Array, Info]:
    """The rows of one label with the largest gradient norms `‖∇_θ ℓ(x_i, y_i)‖`: those that move a network most.

    Args:
      loss_fn: per-example training loss.
      subject: the training `Data`, integer labels.
      known: `surrogates` or `params`, a trained network.
      label: the rows' label.
      num_rows: static.
      batch_size: static, how many gradients are in memory at a time.

    Returns:
      `(rows [num_rows], info)`, largest first; info: `norm [n]`, -inf for rows of other labels and absent ones.

    References: Souri et al., NeurIPS 2022, section 3.3.
    """
    checks.count("num_rows", num_rows, 1)
    checks.count("batch_size", batch_size, 1)
    by = "attacks.largest_gradients"
    if num_rows > subject.num_rows:
        raise ValueError(f"num_rows: expected at most the {subject.num_rows} rows of the data, got {num_rows}.")
    chosen, fixed = tree.partition(_craft.networks(known, by))
    eligible = (subject.y == jnp.asarray(label, subject.y.dtype)) & (subject.weight > 0)
    if checks.is_concrete(eligible) and int(jnp.sum(eligible)) < num_rows:
        raise ValueError(f"num_rows: expected at most the {int(jnp.sum(eligible))} rows of label {label}, got {num_rows}.")

    def norm(row: Data) -> jax.Array:
        alone = jax.tree.map(lambda leaf: leaf[None], row)
        return tree.norm(jax.grad(lambda own: jnp.sum(loss_fn(tree.merge(own, fixed), alone)))(chosen))

    norms = jax.lax.map(norm, losses.present(subject), batch_size=min(batch_size, subject.num_rows))
    norms = jnp.where(eligible, norms, -jnp.inf)
    return jnp.argsort(-norms, stable=True)[:num_rows], {"norm": norms}

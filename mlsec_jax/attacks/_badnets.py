"""BadNets: stamp a trigger on a share of the training rows and relabel them (Gu, Dolan-Gavitt, Garg 2017)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import checks
from mlsec_jax.base import Data, Info, Key, Known, Transform
from mlsec_jax.threat import Relabel, Trigger, backdoor


def badnets(
    trigger: Trigger,
    *,
    num_poisons: int,
    relabel: Relabel | None,
    sources: Sequence[int] | None = None,
    append: bool = False,
) -> Transform:
    """Stamps the trigger on rows drawn at random and relabels them: `(x_i ⊕ Δ, τ(y_i))` for i in a random set P.

    Threat: changes - inputs and labels of `num_poisons` rows, or adds them; sees - the training set; budget -
    `num_poisons`; assumes - labels are the attacker's to choose, and the trigger can be shown at test time.

    Args:
      trigger: `threat.patch`, `pixel`, `blend`, `additive`, `stripes`, `warp`.
      num_poisons: static.
      relabel: `threat.to_class(target)` (single-target), `threat.to_next(num_classes)` (all-to-all), any function of
        labels, or None: labels stay.
      sources: classes to draw from (integer labels), for a source-specific backdoor or, with `relabel=None`, a
        clean-label one; None: every row whose label changes.
      append: fill the last `num_poisons` rows, reserved beforehand (`threat.reserve`), with stamped copies, as the paper
        does; else the rows themselves are replaced ("moved").

    Returns:
      A `Transform` of training `Data`; info: `rows [num_poisons]` that were stamped, `poisoned [n]` (bool), the rows
      that now hold poisons. Where fewer rows are eligible and that cannot be seen (under a trace), fewer are poisoned.

    References: Gu, Dolan-Gavitt & Garg, "BadNets", arXiv:1708.06733, section 4.
    """
    checks.count("num_poisons", num_poisons)
    if relabel is None and sources is None:
        raise ValueError("sources: expected classes to draw from where labels stay (relabel=None), got None.")

    def eligible(subject: Data) -> jax.Array:
        allowed = subject.weight > 0
        if sources is not None:
            if subject.y.ndim != 1:
                raise ValueError(f"subject.y: sources need integer labels [n], got shape {subject.y.shape}.")
            return allowed & jnp.any(subject.y[:, None] == jnp.asarray(sources, subject.y.dtype)[None], axis=1)
        if relabel is None:
            return allowed
        changed = relabel(subject.y) != subject.y
        return allowed & (changed if subject.y.ndim == 1 else jnp.any(changed, axis=1))

    def transform(key: Key, subject: Data, known: Known) -> tuple[Data, Info]:
        del known
        draw_key, place_key = jax.random.split(key)
        allowed = eligible(subject)
        if checks.is_concrete(allowed):
            num_allowed = int(np.asarray(allowed).sum())
            if num_poisons > num_allowed:
                raise ValueError(f"num_poisons: expected at most the {num_allowed} eligible rows, got {num_poisons}.")
            if append and np.asarray(subject.weight)[subject.num_rows - num_poisons :].any():
                raise ValueError(f"append: expected {num_poisons} reserved rows of weight 0 at the end (threat.reserve).")
        draw = jax.random.uniform(draw_key, allowed.shape)
        rows = jnp.argsort(jnp.where(allowed, draw, jnp.inf))[:num_poisons]
        into = jnp.arange(subject.num_rows - num_poisons, subject.num_rows) if append else None
        reach = backdoor(trigger, rows, relabel=relabel, into=into, place_key=place_key)
        poisoned = jnp.zeros(subject.num_rows, bool).at[rows if into is None else into].set(allowed[rows])
        stamped = reach.embed(trigger.pattern, subject)
        chosen = lambda new, old: jnp.where(poisoned.reshape(-1, *[1] * (new.ndim - 1)), new, old)
        return jax.tree.map(chosen, stamped, subject), {"rows": rows, "poisoned": poisoned}

    return transform

"""Training of a network that paints holes, on unlabelled clean images: reconstruction, then a Wasserstein critic."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mlsec_jax import checks, loop, losses, tree
from mlsec_jax.base import Data, Info, Key, Params


class InpaintingRecipe(NamedTuple):
    """How to train an inpainting network: Adam along a cosine; the critic has its say in the last steps.

    Attributes:
      num_epochs: over the physical rows.
      batch_size: rows a step.
      learning_rate: at the start.
      low: smallest side of a hole, in pixels.
      high: largest side.
      adversarial: weight of the critic's opinion beside the L1 error.
      share: of the steps, the last, in which there is a critic.
      critic_steps: of the critic, each on a batch of its own, for each step of the network then.
      critic_rate: the critic's learning rate (Adam with β = 0.5, 0.9).
      penalty: weight of the gradient penalty.
    """

    num_epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 2e-3
    low: int = 4
    high: int = 14
    adversarial: float = 1e-3
    share: float = 0.2
    critic_steps: int = 5
    critic_rate: float = 1e-4
    penalty: float = 10.0


def random_holes(key: Key, num: int, shape: tuple[int, int], *, low: int = 4, high: int = 14) -> jax.Array:
    """Random holes: half of them rectangles, half blobs (three discs near one another).

    Args:
      key: draws them.
      num: how many.
      shape: `(h, w)` of the images.
      low: smallest side of a rectangle, or diameter of a disc, in pixels.
      high: largest.

    Returns:
      `[num, h, w, 1]`, 1 in the hole and 0 elsewhere. A disc's centre is inside the image, the rest of it may stand out.
    """
    checks.count("low", low, 1)
    checks.count("high", high, low)
    if high > min(shape):
        raise ValueError(f"high: expected holes that fit images of {shape[0]}x{shape[1]}, got {high}.")
    kind_key, side_key, place_key, near_key = jax.random.split(key, 4)
    rows, columns = (jnp.arange(size, dtype=jnp.result_type(float)) + 0.5 for size in shape)
    extent = jnp.asarray(shape, rows.dtype)
    side = jax.random.randint(side_key, (num, 3, 2), low, high + 1).astype(rows.dtype)
    start = jnp.floor(jax.random.uniform(place_key, (num, 2)) * (extent[None] - side[:, 0] + 1))
    within = lambda axis, at: (at[None] > start[:, axis, None]) & (at[None] < (start + side[:, 0])[:, axis, None])
    rectangle = within(0, rows)[:, :, None] & within(1, columns)[:, None]

    centre = start + side[:, 0] / 2
    centres = centre[:, None] + jax.random.uniform(near_key, (num, 3, 2), minval=-0.5, maxval=0.5) * side
    centres = jnp.clip(centres, 0.5, extent[None, None] - 0.5)
    apart = lambda axis, at: jnp.square(at[None, None] - centres[:, :, axis, None])
    square = apart(0, rows)[:, :, :, None] + apart(1, columns)[:, :, None]
    blob = jnp.any(square <= jnp.square(side[:, :, 0] / 2)[:, :, None, None], axis=1)
    chosen = jnp.where(jax.random.bernoulli(kind_key, 0.5, (num, 1, 1)), rectangle, blob)
    return chosen[:, :, :, None].astype(rows.dtype)


def pretrain_inpainter(
    key: Key, painter: Any, clean: Data, recipe: InpaintingRecipe, *, critic: Any = None
) -> tuple[Params, Info]:
    """Trains a network G to paint random holes M of clean images; labels are not read.

    G minimises `mean ‖M (G(x, M) - x)‖₁ / ‖M‖₁ - λ mean D(x̂)`, `x̂ = (1 - M) x + M G(x, M)`; in the last steps only, a critic D
    minimises `mean D(x̂) - mean D(x) + penalty · mean (‖∇D(x̃)‖₂ - 1)²`, x̃ between x and x̂ at random.

    It is a pure function: jit it once, outside; `memo` keeps what it gives.

    Args:
      key: draws the parameters, the batches and the holes.
      painter: a network of `[x, mask]` with images as outputs, such as `models.inpainter()`.
      clean: images `[n, h, w, c]` in [0, 1].
      recipe: the `InpaintingRecipe`.
      critic: a network of `[x, mask]` with one output, such as `models.patch_critic()`; None: reconstruction alone.

    Returns:
      `(params, info)`, of the painter; info: `l1 [steps]`, the error on the holes of each batch; `distance [steps with a
      critic]`, the critic's estimate `mean D(x) - mean D(x̂)`.

    References: Doan, Abbasnejad & Ranasinghe, ACSAC 2020, section 4.3; Gulrajani et al., NeurIPS 2017, eq. (3) and
      algorithm 1. Deviates from the former in: one critic of patches in place of a global and a local one; L1; its training
      code is not public.
    """
    checks.count("recipe.num_epochs", recipe.num_epochs)
    checks.count("recipe.critic_steps", recipe.critic_steps, 1)
    checks.count("recipe.batch_size", recipe.batch_size, 1)
    checks.count("clean.num_rows", clean.num_rows, recipe.batch_size)
    checks.between("recipe.share", recipe.share, 0, 1)
    num_steps = recipe.num_epochs * (clean.num_rows // recipe.batch_size)
    judged = 0 if critic is None else int(recipe.share * num_steps)
    init_key, critic_key, first_key, last_key = jax.random.split(key, 4)
    row = jnp.concatenate([clean.x[:1], clean.x[:1, :, :, :1]], axis=3)
    optimizer = optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, max(num_steps, 1)))
    critic_optimizer = optax.adam(recipe.critic_rate, b1=0.5, b2=0.9)

    def draw(key: Key, rows: jax.Array) -> tuple[Data, jax.Array]:
        batch = losses.present(tree.take(clean, rows))
        shape = batch.x.shape[1:3]
        hole = random_holes(key, len(rows), (shape[0], shape[1]), low=recipe.low, high=recipe.high)
        return batch, hole.astype(batch.x.dtype)

    def paint(params: Params, x: jax.Array, hole: jax.Array) -> tuple[jax.Array, jax.Array]:
        painted = painter.apply(params, jnp.concatenate([x, hole], axis=3))
        error = jnp.sum(hole * jnp.abs(painted - x), axis=(1, 2, 3)) / (jnp.sum(hole, axis=(1, 2, 3)) * x.shape[3])
        return (1 - hole) * x + hole * painted, error

    def opinion(params: Params, x: jax.Array, hole: jax.Array) -> jax.Array:
        return critic.apply(params, jnp.concatenate([x, hole], axis=3))[:, 0]

    def painter_step(carry: tuple, key: Key, rows: jax.Array, critic_params: Params) -> tuple[tuple, jax.Array]:
        batch, hole = draw(key, rows)

        def objective(params: Params) -> tuple[jax.Array, jax.Array]:
            whole, error = paint(params, batch.x, hole)
            l1 = losses.weighted_mean(error, batch.weight)
            if critic_params is None:
                return l1, l1
            approval = losses.weighted_mean(opinion(critic_params, whole, hole), batch.weight)
            return l1 - jnp.asarray(recipe.adversarial, l1.dtype) * approval, l1

        params, state = carry
        gradient, l1 = jax.grad(objective, has_aux=True)(params)
        return loop.apply_optimizer(optimizer, gradient, state, params), l1

    def critic_step(carry: tuple, key: Key, rows: jax.Array, params: Params) -> tuple[tuple, jax.Array]:
        hole_key, mix_key = jax.random.split(key)
        batch, hole = draw(hole_key, rows)
        fake, _ = paint(params, batch.x, hole)
        mix = jax.random.uniform(mix_key, (len(rows), 1, 1, 1), batch.x.dtype)
        between = mix * batch.x + (1 - mix) * fake

        def objective(critic_params: Params) -> tuple[jax.Array, jax.Array]:
            slope = jax.grad(lambda x: jnp.sum(opinion(critic_params, x, hole)))(between)
            norm = jnp.sqrt(jnp.sum(jnp.square(slope), axis=(1, 2, 3)) + 1e-12)
            apart = opinion(critic_params, batch.x, hole) - opinion(critic_params, fake, hole)
            steep = losses.weighted_mean(jnp.square(norm - 1), batch.weight)
            distance = losses.weighted_mean(apart, batch.weight)
            return jnp.asarray(recipe.penalty, steep.dtype) * steep - distance, distance

        critic_params, state = carry
        gradient, distance = jax.grad(objective, has_aux=True)(critic_params)
        return loop.apply_optimizer(critic_optimizer, gradient, state, critic_params), distance

    def alone(carry: tuple, slot: tuple) -> tuple[tuple, jax.Array]:
        key, rows = slot
        return painter_step(carry, key, rows, None)

    def together(carry: tuple, slot: tuple) -> tuple[tuple, tuple]:
        own, judge = carry
        keys, rows = slot
        judge, distance = jax.lax.scan(lambda c, s: critic_step(c, *s, own[0]), judge, (keys[1:], rows[1:]))
        own, l1 = painter_step(own, keys[0], rows[0], judge[0])
        return (own, judge), (l1, distance[-1])

    params = painter.init(init_key, row)
    own = (params, optimizer.init(params))
    own, l1 = jax.lax.scan(alone, own, _slots(first_key, clean.num_rows, recipe.batch_size, num_steps - judged))
    if not judged:
        return own[0], {"l1": l1, "distance": jnp.zeros(0, l1.dtype)}
    critic_params = critic.init(critic_key, row)
    judge = (critic_params, critic_optimizer.init(critic_params))
    slots = _slots(last_key, clean.num_rows, recipe.batch_size, judged * (1 + recipe.critic_steps))
    slots = jax.tree.map(lambda leaf: leaf.reshape(judged, 1 + recipe.critic_steps, *leaf.shape[1:]), slots)
    (own, _), (late, distance) = jax.lax.scan(together, (own, judge), slots)
    return own[0], {"l1": jnp.concatenate([l1, late]), "distance": distance}


def _slots(key: Key, num_rows: int, batch_size: int, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """A key and the rows of a batch for each step."""
    batch_key, step_key = jax.random.split(key)
    keys = jax.vmap(lambda k: jax.random.fold_in(step_key, k))(jnp.arange(num_steps))
    schedule = loop.shuffled(batch_size)(batch_key, num_rows, num_steps)
    assert schedule is not None
    return keys, schedule.rows

"""Ground truth that no code under test has a hand in."""

import jax
import jax.numpy as jnp
import numpy as np


def central_differences(fn, x, step=1e-5, num=None, seed=0):
    """Slopes of `fn` along random unit directions, and the directions `[num, ...]`."""
    rng = np.random.default_rng(seed)
    directions = [rng.normal(size=x.shape) for _ in range(num or 3)]
    directions = [jnp.asarray(u / np.linalg.norm(u), x.dtype) for u in directions]
    slopes = np.array([(float(fn(x + step * u)) - float(fn(x - step * u))) / (2 * step) for u in directions])
    return slopes, directions


def relative_error(fn, x, step=1e-5, num=3, seed=0):
    """`‖∇f·u - central differences‖ / ‖central differences‖` over a few random directions.

    The differences come from `fn` as it is called, not from the program of its gradient: a derivative rule may give
    another value than the function that it is the rule of.
    """
    slopes, directions = central_differences(fn, x, step, num, seed)
    gradient = jax.jit(jax.grad(fn))(x)
    ours = np.array([float(jnp.vdot(gradient, u)) for u in directions])
    return np.linalg.norm(ours - slopes) / np.linalg.norm(slopes)


def trees_equal(a, b):
    """Whether two pytrees agree bit for bit, in structure, shape, dtype and value."""
    same = lambda u, v: u.dtype == v.dtype and u.shape == v.shape and bool(jnp.array_equal(_raw(u), _raw(v)))
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        same(jnp.asarray(u), jnp.asarray(v)) for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )


def _raw(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def trees_close(a, b, rtol=1e-5, atol=1e-6):
    """Whether two pytrees agree within tolerance."""
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.allclose(np.asarray(_raw(u)), np.asarray(_raw(v)), rtol=rtol, atol=atol, equal_nan=True)
        for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b))
    )

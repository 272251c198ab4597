"""The painter doesn't see what is in the hole, and sees what is around it."""

import jax
import jax.numpy as jnp
import numpy as np

from mlsec_jax import models

KEY = jax.random.key(0)


def test_the_painter_is_blind_in_the_hole_only():
    model = models.inpainter(width=4, mean=np.array([0.2, 0.5, 0.4], np.float32))
    x = jax.random.uniform(KEY, (2, 16, 16, 3))
    mask = jnp.zeros((2, 16, 16, 1)).at[:, 4:9, 6:12].set(1)
    params = model.init(KEY, jnp.concatenate([x, mask], axis=3))
    apply = jax.jit(lambda x: model.apply(params, jnp.concatenate([x, mask], axis=3)))
    out = apply(x)
    assert out.shape == x.shape and out.min() >= 0 and out.max() <= 1
    np.testing.assert_array_equal(apply(jnp.where(mask > 0, 0.9, x)), out)
    assert not np.array_equal(apply(x.at[:, 3, 8].set(0.9)), out)


def test_the_bottleneck_is_as_wide_as_its_dilations():
    """A change of one pixel reaches further with a dilated bottleneck: by stride 2 times the dilation."""
    reach = {}
    for dilation in (1, 4):
        model = models.inpainter(width=4, num_downs=1, dilations=(dilation,))
        params = model.init(KEY, (32, 32, 2))
        x = jnp.full((1, 32, 32, 2), 0.5).at[..., 1].set(0)
        slope = jax.jit(jax.grad(lambda x, params, model=model: model.apply(params, x)[0, 16, 16, 0]))(x, params)
        reach[dilation] = 16 - np.flatnonzero(np.asarray(jnp.abs(slope).max(axis=(0, 2, 3))))[0]
    assert reach[4] - reach[1] == 2 * 3


def test_the_critic_has_no_batch_statistics():
    model = models.patch_critic(width=4)
    x = jax.random.normal(KEY, (3, 16, 16, 4))
    params = model.init(KEY, x)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(params, x)[1:2], apply(params, x[1:2]), rtol=1e-5, atol=1e-6)

"""What a loop over a constant kernel repeats, read in the compiled program; the gradient of an image layer, timed."""

import re
import time

import jax
import jax.numpy as jnp
import pytest

from mlsec_jax.models._conv import conv

pytestmark = pytest.mark.optimised


def computations(program):
    """Name -> text of every computation of a compiled program."""
    blocks = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL)
    return dict(blocks)


def reached(name, blocks):
    """The text of a computation and of all that it calls."""
    called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", blocks[name])
    return blocks[name] + "".join(reached(each, blocks) for each in called)


def test_the_flipped_kernel_leaves_the_loop():
    x, kernel = jnp.ones((1, 8, 8, 24)), jnp.ones((3, 3, 24, 32))

    def descend(x, kernel):
        slope = jax.grad(lambda x: jnp.sum(conv(x, kernel) ** 2))
        return jax.lax.scan(lambda x, _: (x - 1e-3 * slope(x), None), x, None, length=7)[0]

    blocks = computations(jax.jit(descend).lower(x, kernel).compile().as_text())
    (body,) = {name for text in blocks.values() for name in re.findall(r" while\(.*body=%?([\w.\-]+)", text)}
    assert "reverse(" in "".join(blocks.values())
    assert "reverse(" not in reached(body, blocks)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the form is that of CPUs")
def test_the_gradient_of_an_image_layer_is_one_product_and_faster_than_xlas():
    """Half again to six times, by machine, where nothing else runs."""
    operands = jnp.ones((100, 32, 32, 3)), jnp.ones((3, 3, 3, 32)), jnp.ones((100, 32, 32, 32))

    def theirs(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    slopes = [jax.jit(lambda x, k, g, f=f: jax.vjp(lambda k: f(x, k), k)[1](g)[0]) for f in (conv, theirs)]
    ours, xlas = (slope.lower(*operands).compile() for slope in slopes)
    assert ours.as_text().count(" dot(") == 1 and " convolution(" not in ours.as_text()
    assert " convolution(" in xlas.as_text()

    def cost(slope):
        start = time.process_time()
        slope(*operands).block_until_ready()
        return time.process_time() - start

    costs = [[cost(slope) for slope in (ours, xlas)] for _ in range(7)]
    assert min(mine for mine, _ in costs[1:]) <= min(its for _, its in costs[1:]), costs

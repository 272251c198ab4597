"""What a loop over a constant kernel repeats: read in the compiled program."""

import re

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

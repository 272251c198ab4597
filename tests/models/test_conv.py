"""The convolution equals XLA's in every derivative, and costs the same in a loop."""

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from mlsec_jax.models import conv

LABELS = ("NHWC", "HWIO", "NHWC")
TAU = 1.5  # what a step may cost in a loop, in single calls


def draw(seed, *shapes, dtype=np.float32):
    generator = np.random.default_rng(seed)
    return [jnp.asarray(generator.normal(size=shape).astype(dtype)) for shape in shapes]


def every_order(f, x, kernel):
    """Values and derivatives in every mode that the library uses, batches included."""
    grad = jax.grad(lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel))), (0, 1))
    xs, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel])
    return {
        "value": f(x, kernel),
        "grad": grad(x, kernel),
        "forward over reverse": jax.jvp(grad, (x, kernel), (x * x, kernel * kernel))[1],
        "reverse over reverse": jax.grad(lambda x, k: sum(jnp.sum(g**3) for g in grad(x, k)), (0, 1))(x, kernel),
        "vmap of both": jax.vmap(grad)(xs, kernels),
        "vmap of inputs": jax.vmap(grad, (0, None))(xs, kernel),
        "vmap of kernels": jax.vmap(grad, (None, 0))(x, kernels),
        "nested vmap": jax.vmap(jax.vmap(f, (0, None)), (None, 0))(xs, kernels),
        "per example": jax.vmap(lambda row: grad(row[None], kernel))(x),
        "scan": lax.scan(lambda k, _: (k - 0.1 * grad(x, k)[1], f(x, k)), kernel, length=2),
    }


@pytest.mark.parametrize(
    ("channels", "taps", "stride", "dilation", "padding"),
    [
        (3, (3, 3), (1, 1), (1, 1), "SAME"),
        (2, (3, 2), (2, 3), (1, 1), "SAME"),
        (2, (1, 1), (2, 2), (1, 1), "VALID"),
        (2, (2, 3), (3, 2), (2, 1), ((2, 1), (-1, 3))),
        (1, (2, 2), (2, 1), (1, 2), ((1, -2), (2, 2))),
    ],
)
def test_every_derivative_equals_that_of_xla(channels, taps, stride, dilation, padding):
    def reference(x, kernel):
        return lax.conv_general_dilated(x, kernel, stride, padding, None, dilation, dimension_numbers=LABELS)

    with jax.enable_x64(True):
        x, kernel = draw(0, (2, 9, 8, channels), (*taps, channels, 3), dtype=np.float64)
        ours = lambda x, kernel: conv(x, kernel, stride=stride, padding=padding, dilation=dilation)
        found, expected = jax.jit(
            lambda x, kernel: (every_order(ours, x, kernel), every_order(reference, x, kernel))
        )(x, kernel)
    for name, leaves in expected.items():
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(leaves), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11 * float(np.abs(b).max()), err_msg=name)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize(
    ("images", "taps", "outputs", "padding"),
    [
        ((12, 13, 3), (3, 2), 32, "SAME"),
        ((15, 16, 1), (5, 3), 10, ((0, 2), (1, 0))),
        ((14, 13, 2), (1, 3), 8, "VALID"),
        ((13, 12, 8), (1, 1), 8, "VALID"),
    ],
)
def test_the_gradient_of_few_channels_is_a_product(images, taps, outputs, padding, dtype):
    """Alone, for several models at once under either rule, and differentiated again."""
    with jax.enable_x64(True):
        x, kernel = draw(6, (2, 3, *images), (2, *taps, images[2], outputs), dtype=np.float64)
        rounded = [v.astype(dtype) for v in (x, kernel)]

        def slope(f):
            return jax.grad(lambda kernel, x: jnp.sum(jnp.sin(f(x, kernel).astype(float)) ** 2))

        def found(x, kernel):
            ours = {rule: slope(lambda x, k, r=rule: conv(x, k, padding=padding, batch_rule=r)) for rule in ("map", "vmap")}
            again = jax.jvp(lambda kernel: ours["map"](kernel, x[0]), (kernel[0],), (kernel[1],))
            return [*again, *(jax.vmap(rule)(kernel, x) for rule in ours.values())]

        def expected(x, kernel):
            theirs = slope(lambda x, k: lax.conv_general_dilated(x, k, (1, 1), padding, dimension_numbers=LABELS))
            each = jnp.stack([theirs(kernel[i], x[i]) for i in (0, 1)])
            return [*jax.jvp(lambda kernel: theirs(kernel, x[0]), (kernel[0],), (kernel[1],)), each, each]

        lowered = jax.jit(found).lower(*rounded)
        assert lowered.as_text().count("dot_general") == 4  # one each, and two for the value and the tangent
        pairs = zip(lowered.compile()(*rounded), jax.jit(expected)(*(v.astype(float) for v in rounded)), strict=True)
    for a, b in pairs:
        tolerance = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 0.1}[dtype] * float(np.abs(b).max())
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=tolerance, rtol=0)


def test_the_batch_rule_changes_nothing_but_speed():
    x, kernel = draw(1, (3, 2, 6, 6, 2), (3, 3, 3, 2, 4))
    grads = [
        jax.jit(jax.vmap(jax.grad(lambda k, x, r=rule: jnp.sum(jnp.sin(conv(x, k, batch_rule=r))))))(kernel, x)
        for rule in (None, "map", "vmap")
    ]
    np.testing.assert_allclose(grads[1], grads[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[2], grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtypes_are_kept(dtype):
    x, kernel = (v.astype(dtype) for v in draw(2, (2, 5, 5, 2), (3, 3, 2, 2)))
    value, (dx, dk) = jax.value_and_grad(lambda x, k: jnp.sum(conv(x, k)), (0, 1))(x, kernel)
    assert {v.dtype for v in (value, dx, dk)} == {jnp.dtype(dtype)}


def test_eager_equals_jit_and_the_second_call_does_not_retrace():
    x, kernel = draw(3, (2, 5, 5, 2), (3, 3, 2, 2))
    traces = []

    @jax.jit
    def f(x, kernel):
        traces.append(1)
        return conv(x, kernel)

    np.testing.assert_allclose(f(x, kernel), conv(x, kernel), rtol=1e-6)
    f(x + 1, kernel)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=jnp.zeros((2, 5, 5, 3)), kernel=jnp.zeros((3, 3, 2, 4))), "with the same c"),
        (dict(x=jnp.zeros((2, 5, 5, 2), jnp.uint8), kernel=jnp.zeros((3, 3, 2, 4))), "floating dtype"),
        (dict(x=jnp.zeros((2, 2, 5, 2)), kernel=jnp.zeros((3, 3, 2, 4)), padding="VALID"), "cover the kernel"),
        (dict(x=jnp.zeros((2, 5, 5, 2)), kernel=jnp.zeros((3, 3, 2, 4)), stride=0), "stride: expected an integer"),
        (dict(x=jnp.zeros((2, 5, 5, 2)), kernel=jnp.zeros((3, 3, 2, 4)), padding="same"), "padding: expected one of"),
        (dict(x=jnp.zeros((2, 5, 5, 2)), kernel=jnp.zeros((3, 3, 2, 4)), batch_rule="scan"), "batch_rule: expected"),
        *(
            (dict(x=jnp.zeros((2, 5, 5, 2)), kernel=jnp.zeros((3, 3, 2, 4)), padding=padding), "integers .*top, bottom")
            for padding in (1, (1, 1), ((1.7, 0), (0, 0)), ((1, 1),), ((1, 1), (1,)))
        ),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        conv(**arguments)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_it_lowers_for_accelerators(platform):
    x, kernel = draw(4, (2, 2, 6, 6, 2), (2, 3, 3, 2, 4))
    grads = jax.jit(jax.vmap(jax.grad(lambda k, x: jnp.sum(conv(x, k, stride=2) ** 2))))
    text = jax.export.export(grads, platforms=[platform])(kernel, x).mlir_module()
    assert "feature_group_count = 2" in text  # many models are one grouped convolution there
    assert "stablehlo.while" not in text


@pytest.mark.parametrize("stride", [1, 2])
def test_shardings_of_the_batch_and_shard_map(stride):
    """Two forced devices: rows stay where they are and the kernel's gradient costs one all-reduce."""
    code = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from mlsec_jax.models import conv, depthwise
        x = jax.random.normal(jax.random.key(0), (4, 12, 12, 3))
        kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 20))
        grads = jax.grad(lambda x, k: jnp.sum(jnp.sin(conv(x, k, stride=STRIDE))), (0, 1))
        expected = jax.jit(grads)(x, kernel)
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2,), ("rows",), axis_types=(kind,))
            xs, ks = jax.device_put(x, NamedSharding(mesh, P("rows"))), jax.device_put(kernel, NamedSharding(mesh, P()))
            compiled = jax.jit(grads).lower(xs, ks).compile()
            assert "all-gather" not in compiled.as_text() and "all-reduce" in compiled.as_text()
            found = compiled(xs, ks)
            assert found[0].sharding.spec[0] == "rows", found[0].sharding
            for a, b in zip(found, expected):
                np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)
        mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
        for layer, k in ((conv, kernel), (depthwise, kernel[..., 0])):
            run = lambda x, k: layer(x, k, stride=STRIDE)
            slope = lambda f: jax.grad(lambda x, k: jnp.sum(jnp.sin(f(x, k))), (0, 1))
            expected = jax.jit(slope(run))(x, k)
            for check in (True, False):
                f = jax.shard_map(run, mesh=mesh, in_specs=(P("rows"), P()), out_specs=P("rows"), check_vma=check)
                for a, b in zip(jax.jit(slope(f))(x, k), expected):
                    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-4, atol=1e-4)
    """
    root = Path(__file__).parents[2]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(root),
        "JAX_PLATFORMS": "cpu",
    }
    code = textwrap.dedent(code).replace("STRIDE", str(stride))
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


# The guard: a step in a loop costs what a single call costs.


def first_order(x, kernel, **options):
    loss = lambda x, k: jnp.mean(jnp.square(conv(x, k, **options)))
    dx, dk = jax.grad(loss, (0, 1))(x, kernel)
    return x - 0.01 * dx, kernel - 0.01 * dk


def second_order(x, kernel, **options):
    loss = lambda x, k: jnp.mean(jnp.square(conv(x, k, **options)))
    _, (dx, dk) = jax.jvp(jax.grad(loss, (0, 1)), (x, kernel), (x, kernel))
    return x - 0.01 * dx, kernel - 0.01 * dk


STEPS = {
    "first order": (first_order, (64, 14, 14, 32), (3, 3, 32, 32)),
    "second order": (second_order, (32, 14, 14, 32), (3, 3, 32, 32)),
    "strided": (lambda x, k: first_order(x, k, stride=2), (64, 16, 16, 32), (3, 3, 32, 64)),
    "strided, second order": (lambda x, k: second_order(x, k, stride=2), (32, 16, 16, 32), (3, 3, 32, 32)),
    "one by one": (lambda x, k: first_order(x, k, stride=2), (128, 16, 16, 32), (1, 1, 32, 64)),
    "one channel": (first_order, (64, 28, 28, 1), (5, 5, 1, 8)),
    "many kernels": (jax.vmap(first_order), (4, 16, 14, 14, 16), (4, 3, 3, 16, 16)),
}


def cost(f, *arguments):
    """Seconds of processor time, all threads together: a shared machine's other load hardly moves it."""
    start = time.process_time()
    jax.block_until_ready(f(*arguments))
    return time.process_time() - start


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the trap is that of XLA's CPU backend")
@pytest.mark.parametrize("name", list(STEPS))
def test_a_step_in_a_loop_costs_a_single_call(name):
    """Every compiled convolution has the labels that the fast kernels take, and the clock agrees."""
    step, x_shape, kernel_shape = STEPS[name]
    x, kernel = draw(5, x_shape, kernel_shape)
    length = 4
    single = jax.jit(step).lower(x, kernel).compile()
    loop = jax.jit(lambda *z: lax.scan(lambda z, _: (step(*z), None), z, length=length)[0]).lower(x, kernel).compile()
    labels = re.findall(r"dim_labels=([^,\s]+)", loop.as_text())
    assert labels and set(labels) == {"b01f_01io->b01f"}
    jax.block_until_ready((single(x, kernel), loop(x, kernel)))
    ratios = []
    for _ in range(3):  # the median of five neighbours, three times at most
        pairs = [(cost(loop, x, kernel) / length, cost(single, x, kernel)) for _ in range(5)]
        ratios.append(float(np.median([a / b for a, b in pairs])))
        if ratios[-1] <= TAU:
            return
    pytest.fail(f"{name}: a step in a loop costs {ratios} single calls, expected at most {TAU}.")


def test_a_kernel_larger_than_the_image_is_exchanged_for_it():
    x = jax.random.normal(jax.random.key(0), (3, 5, 4, 2))
    kernel = jax.random.normal(jax.random.key(1), (9, 7, 2, 6))
    padding = ((8, 6), (5, 7))
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    found = jax.jit(lambda x, kernel: conv(x, kernel, padding=padding))
    np.testing.assert_allclose(found(x, kernel), expected, rtol=1e-5, atol=1e-5)
    shapes = [m for m in found.lower(x, kernel).as_text().splitlines() if "stablehlo.convolution" in m]
    assert len(shapes) == 1 and "tensor<6x9x7x2xf32>" in shapes[0]

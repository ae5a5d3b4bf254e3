import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from flax import nnx
from helpers import normal

from orthax.linalg import convolution_matrix, convolution_singular_values


def per_axis(x, axes):
    return tuple(x) if isinstance(x, tuple | list) else (x,) * axes


# --- the matrix by explicit indexing


def first_tap_and_windows(size, taps, stride, dilation, padding):
    """Where the first tap of the first window lies, and the number of windows, on one axis.

    Circular windows are centred on their pixel (one to the left for even kernels, as in Flax).
    """
    extent = (taps - 1) * dilation + 1
    if padding == "CIRCULAR":
        return -((extent - 1) // 2), -(-size // stride)
    if padding == "SAME":
        count = -(-size // stride)
        return -(max((count - 1) * stride + extent - size, 0) // 2), count
    before, after = {"VALID": (0, 0), "CAUSAL": (extent - 1, 0)}.get(padding, padding)
    return -before, max((size + before + after - extent) // stride + 1, 0)


def matrix_by_loops(kernel, size, strides=1, *, padding="CIRCULAR", dilation=1, groups=1):
    axes = kernel.ndim - 2
    taps = kernel.shape[:-2]
    size, strides, dilation = (per_axis(x, axes) for x in (size, strides, dilation))
    paddings = [(p, p) if isinstance(p, int) else p for p in per_axis(padding, axes)]
    layout = [
        first_tap_and_windows(*axis)
        for axis in zip(size, taps, strides, dilation, paddings, strict=True)
    ]
    counts = [count for _, count in layout]
    inputs, outputs = kernel.shape[-2], kernel.shape[-1]
    matrix = np.zeros((*counts, outputs, *size, inputs * groups), kernel.dtype)
    for window in np.ndindex(*counts):
        for tap in np.ndindex(*taps):
            pixel = [
                start + w * s + t * d
                for (start, _), w, s, t, d in zip(
                    layout, window, strides, tap, dilation, strict=True
                )
            ]
            if padding == "CIRCULAR":
                pixel = [p % n for p, n in zip(pixel, size, strict=True)]
            elif not all(0 <= p < n for p, n in zip(pixel, size, strict=True)):
                continue
            for output in range(outputs):
                group = output * groups // outputs
                for channel in range(inputs):
                    place = (*window, output, *pixel, group * inputs + channel)
                    matrix[place] += kernel[(*tap, channel, output)]
    return matrix.reshape(np.prod(counts) * outputs, np.prod(size) * inputs * groups)


LAYERS = {  # shape of the kernel, input size, strides, padding, dilation, groups
    "circular": ((3, 3, 2, 3), (4, 5), 1, "CIRCULAR", 1, 1),
    "circular, even": ((2, 4, 1, 2), (4, 5), 1, "CIRCULAR", 1, 1),
    "circular, strided": ((3, 2, 2, 3), (4, 6), (2, 3), "CIRCULAR", 1, 1),
    "circular, leftover": ((3, 2, 3), 7, 2, "CIRCULAR", 1, 1),
    "circular, dilated": ((3, 2, 3), 8, 2, "CIRCULAR", 2, 1),
    "circular, dilated, even": ((2, 1, 3), 6, 1, "CIRCULAR", 3, 1),
    "circular, groups": ((3, 2, 6), 5, 1, "CIRCULAR", 1, 3),
    "same": ((3, 3, 2, 3), (4, 5), 1, "SAME", 1, 1),
    "same, even": ((2, 4, 1, 2), (4, 5), 1, "SAME", 1, 1),
    "same, strided": ((3, 3, 2, 1), (5, 6), 2, "SAME", 1, 1),
    "same, dilated, strided": ((4, 2, 1), 7, 3, "SAME", 2, 1),
    "same, strides beyond the kernel": ((1, 2, 1), 7, 3, "SAME", 1, 1),
    "same, groups": ((3, 1, 4), 5, 1, "SAME", 1, 2),
    "valid": ((3, 2, 2, 3), (4, 5), 1, "VALID", 1, 1),
    "valid, strided": ((2, 2, 3), 7, 2, "VALID", 1, 1),
    "valid, leftover": ((2, 2, 3), 7, 3, "VALID", 1, 1),
    "valid, dilated": ((3, 2, 3), 8, 2, "VALID", 3, 1),
    "valid, groups": ((2, 2, 2, 4), (3, 4), 1, "VALID", 1, 2),
    "causal": ((3, 2, 3), 5, 1, "CAUSAL", 1, 1),
    "causal, dilated, strided": ((3, 2, 3), 8, 2, "CAUSAL", 2, 1),
    "number": ((3, 3, 2, 1), (4, 5), (1, 2), 2, 1, 1),
    "number per axis": ((3, 2, 2, 1), (4, 5), 1, (0, 1), 1, 1),
    "pairs": ((3, 2, 2, 1), (4, 3), (2, 1), ((0, 2), (3, 1)), 1, 1),
    "one pair": ((3, 2, 2), 5, 2, ((3, 1),), 1, 1),
    "one tap": ((1, 1, 3, 2), (2, 3), 1, "SAME", 1, 1),
    "one tap, strided": ((1, 1, 3, 2), (3, 4), 2, "VALID", 1, 1),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def arguments(layer):
    shape, size, strides, padding, dilation, groups = LAYERS[layer]
    options = {"padding": padding, "dilation": dilation, "groups": groups}
    return normal(shape), size, strides, options


@functools.cache
def measured():
    """Matrix and singular values of every layer, from one program."""
    kernels = [arguments(layer)[0] for layer in LAYERS]

    def both(kernels):
        for layer, kernel in zip(LAYERS, kernels, strict=True):
            _, size, strides, options = arguments(layer)
            matrix = convolution_matrix(kernel, size, strides, **options)
            if layer == "circular, leftover":
                yield matrix, None
            else:
                yield matrix, convolution_singular_values(kernel, size, strides, **options)

    return dict(zip(LAYERS, jax.jit(lambda kernels: list(both(kernels)))(kernels), strict=True))


@every_layer
def test_the_matrix_has_the_kernel_where_its_windows_lie(layer):
    kernel, size, strides, options = arguments(layer)
    matrix, _ = measured()[layer]
    assert matrix.dtype == kernel.dtype
    np.testing.assert_array_equal(matrix, matrix_by_loops(kernel, size, strides, **options))


@every_layer
def test_the_matrix_times_an_image_is_what_flax_computes(layer):
    kernel, size, strides, options = arguments(layer)
    *taps, inputs, outputs = kernel.shape
    layer_of_flax = nnx.Conv(
        inputs * options["groups"],
        outputs,
        tuple(taps),
        strides,
        padding=options["padding"],
        kernel_dilation=options["dilation"],
        feature_group_count=options["groups"],
        use_bias=False,
        rngs=nnx.Rngs(0),
    )
    layer_of_flax.kernel[...] = kernel
    images = normal((3, *per_axis(size, len(taps)), inputs * options["groups"]), seed=1)
    expected = nnx.jit(layer_of_flax)(images).reshape(3, -1)
    matrix, _ = measured()[layer]
    np.testing.assert_allclose(images.reshape(3, -1) @ matrix.T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer != "circular, leftover"])
def test_singular_values_are_those_of_the_matrix(layer):
    kernel, size, strides, options = arguments(layer)
    matrix = matrix_by_loops(oracles.float64(kernel), size, strides, **options)
    _, values = measured()[layer]
    expected = np.linalg.svd(matrix, compute_uv=False)
    assert values.dtype == np.float32
    assert values.shape == (min(matrix.shape),)
    assert (np.diff(values) <= 0).all()
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5 * expected[0])


def test_a_kernel_longer_than_the_image_wraps_around():
    for shape, size, strides in [((5, 2, 2), 3, 1), ((4, 1, 3), 2, 2), ((3, 3, 1, 1), (2, 1), 1)]:
        kernel = normal(shape)
        expected = matrix_by_loops(kernel, size, strides)
        matrix = convolution_matrix(kernel, size, strides)
        np.testing.assert_allclose(matrix, expected, rtol=1e-6)
        values = convolution_singular_values(kernel, size, strides)
        expected = np.linalg.svd(oracles.float64(expected), compute_uv=False)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_circular_padding_and_strides_of_one_are_the_default():
    kernel = normal((3, 2, 2))
    np.testing.assert_array_equal(convolution_matrix(kernel, 5), matrix_by_loops(kernel, 5))
    np.testing.assert_array_equal(
        convolution_singular_values(kernel, 5),
        convolution_singular_values(kernel, (5,), (1,), padding="CIRCULAR", dilation=(1,)),
    )


def test_one_number_holds_for_both_axes():
    kernel = normal((2, 2, 1, 2))
    np.testing.assert_array_equal(
        convolution_matrix(kernel, 4, 2, padding=1, dilation=2),
        convolution_matrix(kernel, (4, 4), (2, 2), padding=[(1, 1), 1], dilation=(2, 2)),
    )


def test_the_transpose_is_the_matrix_of_the_transposed_layer():
    kernel = normal((3, 2, 3))
    layer = nnx.ConvTranspose(
        3, 2, 3, 2, padding="CIRCULAR", transpose_kernel=True, use_bias=False,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    layer.kernel[...] = kernel
    images = normal((4, 5, 3), seed=1)
    actual = images.reshape(4, -1) @ convolution_matrix(kernel, 10, 2)
    np.testing.assert_allclose(actual, nnx.jit(layer)(images).reshape(4, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, np.complex64])
def test_the_matrix_keeps_the_dtype_and_singular_values_are_float32(dtype):
    kernel = jnp.asarray(normal((3, 2, 3), np.complex64 if dtype == np.complex64 else np.float32))
    kernel = kernel.astype(dtype)

    both = {
        padding: [
            jax.jit(functools.partial(f, input_size=6, strides=2, padding=padding))(kernel)
            for f in (convolution_matrix, convolution_singular_values)
        ]
        for padding in ("CIRCULAR", "SAME")
    }
    for padding, (matrix, values) in both.items():
        expected = matrix_by_loops(np.asarray(kernel), 6, 2, padding=padding)
        assert matrix.dtype == dtype
        tolerance = 4 * tolerances.eps(np.float32) if dtype == np.complex64 else 0
        np.testing.assert_allclose(np.asarray(matrix), expected, rtol=0, atol=tolerance)
        assert values.dtype == np.float32
        expected = np.linalg.svd(oracles.float64(expected), compute_uv=False)
        np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)


def test_double_precision_is_kept():
    kernel = normal((3, 2, 2, 3), np.float64)
    expected = matrix_by_loops(kernel, 4, 2)
    with tolerances.double_precision():
        matrix = convolution_matrix(jnp.asarray(kernel), 4, 2)
        values = convolution_singular_values(jnp.asarray(kernel), 4, 2)
    assert matrix.dtype == values.dtype == np.float64
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_allclose(values, np.linalg.svd(expected, compute_uv=False), rtol=1e-12)


def test_the_first_singular_value_bounds_how_far_the_layer_stretches_an_image():
    kernel, images = normal((3, 3, 2, 3)), normal((100, 2 * 36), seed=1)
    norm = convolution_singular_values(kernel, 6)[0]
    stretched = np.linalg.norm(images @ convolution_matrix(kernel, 6).T, axis=1)
    ratio = stretched / np.linalg.norm(images, axis=1)
    assert ratio.max() < norm < 4 * ratio.max()


def test_the_gradient_of_a_singular_value_is_the_outer_product_of_its_vectors():
    kernel = normal((3, 2, 3), np.float64)

    def largest(kernel):
        return convolution_singular_values(kernel, 5, padding="VALID")[0]

    u, _, vh = np.linalg.svd(matrix_by_loops(kernel, 5, padding="VALID"))
    with tolerances.double_precision():
        gradient = np.asarray(jax.grad(largest)(jnp.asarray(kernel)))
        direction = normal(kernel.shape, np.float64, seed=1)
        change = u[:, 0] @ matrix_by_loops(direction, 5, padding="VALID") @ vh[0]
    np.testing.assert_allclose((gradient * direction).sum(), change, rtol=1e-9)


def test_an_image_smaller_than_the_kernel_has_no_windows_without_padding():
    assert convolution_matrix(jnp.ones((3, 2, 4)), 2, padding="VALID").shape == (0, 4)
    assert convolution_singular_values(jnp.ones((3, 2, 4)), 2, padding="VALID").shape == (0,)

import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracles
import pytest
import scipy.optimize
import tolerances
from flax import nnx
from helpers import says

from orthax.conv_penalties import convolution_orthogonality, orthogonal_convolution_exists
from orthax.penalties import soft_orthogonality

GOLDEN = pathlib.Path(__file__).parent / "golden" / "reference.npz"

OPTIONS = ("strides", "dilation", "groups", "transposed", "self_padding")
penalty = jax.jit(convolution_orthogonality, static_argnames=OPTIONS)


def normal(shape, dtype=np.float64, seed=0):
    """Of a kernel (*spatial, in, out), so that its operator has a norm near one."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    if np.issubdtype(dtype, np.complexfloating):
        x = (x + 1j * rng.standard_normal(shape)) / 2**0.5
    return (x / np.prod(shape[:-1]) ** 0.5).astype(dtype)


def per_axis(x, axes):
    return (x,) * axes if isinstance(x, int | str) else tuple(x)


def squared_distance(x):
    """Of a matrix from the identity, in the Frobenius norm."""
    return (np.abs(x - np.eye(len(x))) ** 2).sum()


# --- Wang et al. (1911.12207): the convolution of the kernel with itself, entry by entry


def self_convolution(kernel, paddings, strides):
    """Images and filters are both the kernel (M, C, *spatial): (M, M, *offsets)."""
    size = kernel.shape[2:]
    images = np.pad(kernel, [(0, 0), (0, 0), *((p, p) for p in paddings)])
    offsets = [2 * p // s + 1 for p, s in zip(paddings, strides, strict=True)]
    result = np.zeros((len(kernel), len(kernel), *offsets), kernel.dtype)
    for offset in np.ndindex(*offsets):
        for tap in np.ndindex(*size):
            at = tuple(o * s + t for o, s, t in zip(offset, strides, tap, strict=True))
            pixels, weights = images[(..., *at)], kernel[(..., *tap)]
            result[(..., *offset)] += pixels @ weights.conj().T
    return result


def dilated(kernel, dilation):
    """With zeros between the taps (*spatial, in, out)."""
    size = kernel.shape[:-2]
    extent = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    wide = np.zeros((*extent, *kernel.shape[-2:]), kernel.dtype)
    wide[tuple(slice(None, None, d) for d in dilation)] = kernel
    return wide


def l_orth(kernel, strides=1, *, dilation=1, groups=1, transposed=False, self_padding=None):
    """L_orth of a Flax kernel; less the constant M - C S^d of the column case."""
    if transposed:
        kernel = np.swapaxes(kernel, -1, -2)
    axes = kernel.ndim - 2
    strides = per_axis(strides, axes)
    wide = dilated(kernel, per_axis(dilation, axes))
    total = 0
    for part in np.split(wide, groups, axis=-1):
        part = np.moveaxis(part, (-1, -2), (0, 1))
        outputs, inputs, *size = part.shape
        paddings = [(k - 1) // s * s for k, s in zip(size, strides, strict=True)]
        if self_padding is not None:
            paddings = [self_padding] * axes
        result = self_convolution(part, paddings, strides)
        centre = tuple(n // 2 for n in result.shape[2:])
        result[(..., *centre)] -= np.eye(outputs)
        total += (np.abs(result) ** 2).sum()
        if self_padding is None:
            total -= max(0, outputs - inputs * np.prod(strides))
    return total


# --- the layer as a matrix, by explicit indexing


def windows(size, taps, stride, dilation, pads):
    """For one axis: where in the input each tap of each window lies, None where in the padding.

    `pads` is None for circular padding, and (before, after) otherwise.
    """
    extent = (taps - 1) * dilation + 1
    if pads is None:
        starts = range(0, size, stride)
        return [[(start + t * dilation) % size for t in range(taps)] for start in starts]
    before, after = pads
    starts = range(-before, size + after - extent + 1, stride)
    places = [[start + t * dilation for t in range(taps)] for start in starts]
    return [[x if 0 <= x < size else None for x in window] for window in places]


def operator(kernel, size, strides, pads, dilation=1, groups=1):
    """Matrix (outputs, inputs) of the layer on images, channels last; `pads` one per axis."""
    axes = kernel.ndim - 2
    size, strides, dilation = (per_axis(x, axes) for x in (size, strides, dilation))
    inputs, outputs = kernel.shape[-2] * groups, kernel.shape[-1]
    layout = [
        windows(*arguments)
        for arguments in zip(size, kernel.shape[:-2], strides, dilation, pads, strict=True)
    ]
    shape = [len(axis) for axis in layout]
    matrix = np.zeros((*shape, outputs, *size, inputs), kernel.dtype)
    for window in np.ndindex(*shape):
        for tap in np.ndindex(*kernel.shape[:-2]):
            at = tuple(axis[i][t] for axis, i, t in zip(layout, window, tap, strict=True))
            if None in at:
                continue
            for group in range(groups):
                o = slice(group * outputs // groups, (group + 1) * outputs // groups)
                i = slice(group * inputs // groups, (group + 1) * inputs // groups)
                matrix[(*window, o, *at, i)] += kernel[tap][:, o].T
    return matrix.reshape(np.prod(shape) * outputs, np.prod(size) * inputs)


def circular(kernel, count, strides, dilation=1, groups=1):
    """With `count` outputs per axis."""
    axes = kernel.ndim - 2
    size = [n * s for n, s in zip(per_axis(count, axes), per_axis(strides, axes), strict=True)]
    return operator(kernel, size, strides, [None] * axes, dilation, groups)


# --- the value

LAYERS = {  # shape of the kernel, options, outputs per axis of the operator
    "rows": ((3, 3, 4, 3), {}, 5),
    "square": ((2, 2, 3, 3), {}, 3),
    "columns": ((3, 2, 2, 5), {}, (5, 3)),
    "one tap": ((1, 1, 4, 3), {}, 3),
    "oblong": ((1, 4, 3, 2), {}, (2, 7)),
    "strided rows": ((3, 3, 2, 5), {"strides": 2}, 3),
    "strided square": ((3, 3, 1, 4), {"strides": 2}, 3),
    "strided columns": ((3, 3, 1, 6), {"strides": 2}, 3),
    "unequal strides, rows": ((3, 4, 2, 3), {"strides": (1, 2)}, (5, 4)),
    "unequal strides, columns": ((3, 2, 1, 5), {"strides": (2, 1)}, (3, 3)),
    "strides beyond the kernel": ((2, 2, 1, 3), {"strides": 3}, 1),
    "dilated": ((2, 2, 2, 2), {"dilation": 3}, 7),
    "dilated and strided": ((3, 2, 2, 3), {"dilation": (2, 3), "strides": (2, 1)}, (5, 7)),
    "groups, rows": ((2, 3, 3, 4), {"groups": 2}, (3, 5)),
    "groups, strided columns": ((2, 2, 1, 10), {"groups": 2, "strides": 2}, 2),
    "depthwise": ((2, 2, 1, 4), {"groups": 4}, 3),
    "sequence, rows": ((5, 4, 3), {}, 9),
    "sequence, columns": ((5, 2, 5), {}, 9),
    "sequence, strided": ((5, 2, 3), {"strides": 2}, 5),
    "sequence, strided columns": ((4, 1, 5), {"strides": 3}, 3),
    "sequence, groups in columns": ((3, 1, 4), {"groups": 2}, 5),
    "sequence, dilated groups": ((3, 2, 6), {"dilation": 2, "groups": 3, "strides": 3}, 3),
}
COMPLEX = [
    "square",
    "strided columns",
    "sequence, rows",
    "sequence, columns",
    "sequence, strided",
    "sequence, dilated groups",
]
LAYERS_AND_DTYPES = [(layer, np.float64) for layer in LAYERS]
LAYERS_AND_DTYPES += [(layer, np.complex128) for layer in COMPLEX]
every_kernel = pytest.mark.parametrize(
    ("layer", "dtype"), LAYERS_AND_DTYPES, ids=lambda x: x if isinstance(x, str) else x.__name__
)


@jax.jit
def penalties_of_all_layers(kernels):
    return [
        convolution_orthogonality(kernel, **LAYERS[layer][1])
        for (layer, _), kernel in zip(LAYERS_AND_DTYPES, kernels, strict=True)
    ]


@functools.cache
def measured():
    """Random kernels of all layers, and L_orth of them."""
    kernels = [normal(LAYERS[layer][0], dtype) for layer, dtype in LAYERS_AND_DTYPES]
    with tolerances.double_precision():
        values = [np.asarray(value) for value in penalties_of_all_layers(kernels)]
    return dict(zip(LAYERS_AND_DTYPES, zip(kernels, values, strict=True), strict=True))


@every_kernel
def test_the_value_is_the_convolution_of_the_kernel_with_itself_less_the_identity(layer, dtype):
    kernel, value = measured()[layer, dtype]
    assert value.dtype == np.float64
    assert value.shape == ()
    np.testing.assert_allclose(value, l_orth(kernel, **LAYERS[layer][1]), rtol=1e-12)


@every_kernel
def test_the_value_times_the_outputs_is_the_distance_of_the_layer_from_orthogonal(layer, dtype):
    """Achour et al. (2108.05623): of its rows, or its columns where these are fewer."""
    kernel, value = measured()[layer, dtype]
    _, options, count = LAYERS[layer]
    matrix = circular(kernel, count, **{"strides": 1} | options)
    rows, columns = matrix.shape
    if rows > columns:
        matrix = matrix.conj().T
    places = np.prod(per_axis(count, kernel.ndim - 2))
    distance = squared_distance(matrix @ matrix.conj().T)
    np.testing.assert_allclose(places * value, distance, rtol=1e-11)
    np.testing.assert_allclose(places * value / distance, 1.0, rtol=1e-5)


def test_layers_of_both_cases_and_in_between_are_among_those():
    signs = set()
    for shape, options, _ in LAYERS.values():
        strides = per_axis(options.get("strides", 1), len(shape) - 2)
        inputs = shape[-2] * options.get("groups", 1)
        signs.add(np.sign(shape[-1] - inputs * np.prod(strides)))
    assert signs == {-1, 0, 1}


TRANSPOSED = {  # kernel (*spatial, in, out), strides, dilation, inputs per axis
    "more inputs": ((3, 3, 4, 3), 1, 1, 5),
    "strided, few inputs": ((3, 3, 3, 2), 2, 1, 3),
    "strided, many inputs": ((2, 2, 6, 1), 2, 1, 2),
    "sequence, more outputs": ((3, 2, 5), 1, 1, 5),
    "sequence, dilated": ((3, 5, 2), 2, 2, 5),
}


@pytest.mark.parametrize("layer", TRANSPOSED)
def test_a_transposed_layer_is_as_far_from_orthogonal_as_its_operator_in_flax(layer):
    shape, strides, dilation, count = TRANSPOSED[layer]
    axes, kernel = len(shape) - 2, normal(shape, np.float32)
    flax_layer = nnx.ConvTranspose(
        *shape[-2:],
        shape[:-2],
        strides,
        padding="CIRCULAR",
        kernel_dilation=dilation,
        use_bias=False,
        rngs=nnx.Rngs(0),
    )
    flax_layer.kernel[...] = kernel
    inputs = count**axes * shape[-2]
    images = jnp.eye(inputs).reshape(inputs, *[count] * axes, shape[-2])
    matrix = oracles.float64(nnx.jit(flax_layer)(images)).reshape(inputs, -1)
    matrix = matrix if matrix.shape[0] < matrix.shape[1] else matrix.T
    value = penalty(kernel, strides, dilation=dilation, transposed=True)
    np.testing.assert_allclose(
        count**axes * value, squared_distance(matrix @ matrix.T), rtol=1e-5, atol=1e-5
    )
    expected = l_orth(oracles.float64(kernel), strides, dilation=dilation, transposed=True)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("strides", [1, 2])
def test_with_a_transposed_kernel_flax_transposes_the_layer_of_the_same_kernel(strides):
    shape = (3, 2, 3)  # of a convolution from 2 to 3, so the transposed layer goes from 3 to 2
    kernel = normal(shape, np.float32)
    layer = nnx.ConvTranspose(
        3, 2, 3, strides, padding="CIRCULAR", transpose_kernel=True, use_bias=False,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    layer.kernel[...] = kernel
    matrix = oracles.float64(layer(jnp.eye(15).reshape(15, 5, 3))).reshape(15, -1)
    if matrix.shape[0] > matrix.shape[1]:
        matrix = matrix.T
    value = penalty(kernel, strides)
    np.testing.assert_allclose(5 * value, squared_distance(matrix @ matrix.T), rtol=1e-5)


# --- self-padding


@pytest.mark.parametrize("shape", [(3, 2, 1, 6), (5, 2, 3), (4, 2, 3)], ids=str)
def test_self_padding_takes_the_offsets_within_it_and_no_constant_off(shape):
    kernel = normal(shape)
    cases = list(itertools.product((1, 2, 3), range(5 if len(shape) == 3 else 3)))

    def values(kernel):
        return [convolution_orthogonality(kernel, s, self_padding=p) for s, p in cases]

    with tolerances.double_precision():
        actual = np.array(jax.jit(values)(kernel))
    expected = [l_orth(kernel, s, self_padding=p) for s, p in cases]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("shape", [(8, 4, 3), (4, 16, 3), (6, 6, 5)], ids=str)
def test_it_is_the_square_of_what_the_published_code_computes(shape):
    """samaonline/Orthogonal-Convolutional-Neural-Networks: OIHW, padding K // 2, a norm."""
    golden = np.load(GOLDEN)
    case = "ocnn/" + "_".join(map(str, shape))
    kernel = golden[f"{case}/kernel_oihw"].transpose(2, 3, 1, 0)
    for strides in (1, 2):
        expected = golden[f"{case}/deconv_orth_dist_s{strides}"]
        value = penalty(kernel, strides, self_padding=shape[-1] // 2)
        np.testing.assert_allclose(np.sqrt(value), expected, rtol=1e-5)
    distance = np.sqrt(soft_orthogonality(golden[f"{case}/w"]))
    np.testing.assert_allclose(distance, golden[f"{case}/orth_dist"], rtol=1e-5)


def test_the_published_padding_is_blind_to_large_offsets():
    """The corners are 2 apart, so with padding 1 their sum looks orthogonal."""
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[0, 0], kernel[2, 2] = 0.5**0.5, 0.5**0.5
    np.testing.assert_allclose(penalty(kernel, self_padding=1), 0.0, atol=1e-6)
    np.testing.assert_allclose(penalty(kernel), 0.5, rtol=1e-6)
    assert squared_distance(circular(kernel, 5, 1) @ circular(kernel, 5, 1).T) > 1


# --- zero at orthogonal layers, and only there


def one_tap_per_residue(rng, axes, inputs, outputs, groups=1, dtype=np.float64, *, size=None):
    """An orthogonal kernel with one tap for each tuple of residues of positions modulo strides.

    `axes` holds, for each axis, the taps to choose from by their residue. Sums of squares of rows
    are one where there are no more outputs than inputs times residues, and of columns otherwise.
    """
    residues = list(itertools.product(*axes))
    shape = (*size, inputs // groups, outputs)
    kernel = np.zeros(shape, dtype)
    chosen = [
        tuple(rng.choice(axis[r]) for axis, r in zip(axes, combination, strict=True))
        for combination in residues
    ]
    for group in range(groups):
        count, width = inputs // groups, outputs // groups
        block = oracles.orthogonal(rng, count * len(residues), width, dtype)
        for tap, rows in zip(chosen, np.split(block, len(residues)), strict=True):
            kernel[(*tap, slice(None), slice(group * width, (group + 1) * width))] = rows
    return kernel


def by_residue(taps, stride, dilation=1):
    """The given taps of one axis, by the residues of their positions."""
    found = {}
    for tap in taps:
        found.setdefault(tap * dilation % stride, []).append(tap)
    return found


def orthogonal_kernel(rng, shape, strides=1, dilation=1, groups=1, dtype=np.float64):
    axes = len(shape) - 2
    choices = [
        by_residue(range(taps), stride, spread)
        for taps, stride, spread in zip(
            shape, per_axis(strides, axes), per_axis(dilation, axes), strict=False
        )
    ]
    inputs = shape[-2] * groups
    return one_tap_per_residue(rng, choices, inputs, shape[-1], groups, dtype, size=shape[:-2])


# These have fewer residues than outputs per input: 1 of 2 x 1, and 4 of 3 x 3.
NEVER_ORTHOGONAL = ["dilated and strided"]


def test_it_is_zero_for_a_kernel_with_one_tap_per_residue_and_not_nearby():
    rng = np.random.default_rng(0)
    exact, near = [], []
    for layer, dtype in LAYERS_AND_DTYPES:
        shape, options, _ = LAYERS[layer]
        exact.append(orthogonal_kernel(rng, shape, **options, dtype=dtype))
        near.append(exact[-1] + 0.05 * normal(shape, dtype, seed=1))
    with tolerances.double_precision():
        values = [np.array(penalties_of_all_layers(kernels)) for kernels in (exact, near)]
    for (layer, _), kernel, value, other in zip(LAYERS_AND_DTYPES, exact, *values, strict=True):
        _, options, count = LAYERS[layer]
        matrix = circular(kernel, count, **{"strides": 1} | options)
        matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.conj().T
        distance = squared_distance(matrix @ matrix.conj().T)
        if layer in NEVER_ORTHOGONAL:
            assert value > 0.9
        else:
            assert distance < 1e-20, layer
            assert abs(value) < 1e-13, layer
        assert other > 1e-4, layer


def shift(size, offset, channels=2):
    kernel = np.zeros((*size, channels, channels), np.float32)
    kernel[offset] = np.eye(channels)
    return kernel


def test_it_is_exactly_zero_for_shifts_and_so_is_its_gradient():
    kernels = [shift((4,), offset) for offset in [(0,), (1,), (3,)]] + [shift((3, 2), (2, 1))]
    kernels += [shift((1, 1), (0, 0)), (1j * shift((3,), (1,))).astype(np.complex64)]
    kernels += [shift((3,), (2,))[..., :1], shift((3,), (2,))[..., :1, :]]
    function = jax.value_and_grad(convolution_orthogonality)
    for kernel, (value, gradient) in zip(
        kernels, jax.jit(lambda ks: [function(k) for k in ks])(kernels), strict=True
    ):
        np.testing.assert_array_equal(value, 0.0)
        np.testing.assert_array_equal(gradient, np.zeros_like(kernel))


def test_it_is_zero_for_an_orthogonal_matrix_spread_over_the_pixels_of_a_block():
    """k = S, M = C k^2: the layer is a matrix on every block."""
    rng = np.random.default_rng(0)
    for size, channels in [((2, 2), 3), ((3,), 2)]:
        block = oracles.orthogonal(rng, np.prod(size) * channels)
        kernel = block.reshape(*size, channels, -1).astype(np.float32)
        np.testing.assert_allclose(penalty(kernel, size), 0.0, atol=1e-11)
        np.testing.assert_allclose(penalty(2 * kernel, size), 9 * len(block), rtol=1e-5)


def test_it_is_zero_for_a_composition_of_orthogonal_layers():
    """(Q P + Q (I - P) shift) is orthogonal for projections P: a kernel that is no single tap."""
    rng = np.random.default_rng(0)
    u, v = (oracles.orthogonal(rng, 4, 2) for _ in range(2))
    p, r = u @ u.T, v @ v.T
    first = np.stack([p, np.eye(4) - p])
    second = np.stack([r, np.eye(4) - r])
    along = np.stack([first[0] @ second[0], first[0] @ second[1] + first[1] @ second[0],
                      first[1] @ second[1]])  # fmt: skip
    np.testing.assert_allclose(
        squared_distance(circular(along, 6, 1) @ circular(along, 6, 1).T), 0.0, atol=1e-20
    )
    np.testing.assert_allclose(penalty(along.astype(np.float32)), 0.0, atol=1e-11)
    plane = np.einsum("hab,wbc->hwac", first, second).astype(np.float32)
    np.testing.assert_allclose(penalty(plane), 0.0, atol=1e-11)


def test_a_kernel_whose_matrix_is_orthogonal_need_not_be_an_orthogonal_layer():
    matrix = oracles.orthogonal(np.random.default_rng(0), 18, 4)
    kernel = matrix.reshape(3, 3, 2, 4).astype(np.float32)
    assert soft_orthogonality(kernel.reshape(18, 4)) < 1e-10
    assert penalty(kernel) > 0.1


def test_a_kernel_of_one_tap_has_the_soft_orthogonality_of_its_matrix():
    for shape in [(5, 3), (3, 5)]:
        w = normal(shape, np.float32)
        value = penalty(w[None, None])
        np.testing.assert_allclose(value, soft_orthogonality(w), rtol=1e-5)


def test_zero_weights_are_as_far_away_as_the_rank_of_the_identity_and_at_rest():
    for shape, strides, expected in [((2, 2, 4, 3), 1, 3), ((3, 2, 5), 1, 2), ((2, 1, 5), 2, 2)]:
        function = jax.jit(jax.value_and_grad(penalty), static_argnums=1)
        value, gradient = function(jnp.zeros(shape), strides)
        assert value == expected
        assert not np.asarray(gradient).any()


# --- gradients


def naive(kernel, strides):
    """The same in JAX: `lax.conv_general_dilated` of the kernel with itself."""
    axes = kernel.ndim - 2
    strides = per_axis(strides, axes)
    k = jnp.moveaxis(kernel, (-1, -2), (0, 1))
    paddings = [(n - 1) // s * s for n, s in zip(k.shape[2:], strides, strict=True)]
    dimensions = ("NCHW", "OIHW", "NCHW") if axes == 2 else ("NCW", "OIW", "NCW")
    result = jax.lax.conv_general_dilated(
        k, k, strides, [(p, p) for p in paddings], dimension_numbers=dimensions
    )
    centre = tuple(n // 2 for n in result.shape[2:])
    result = result.at[(..., *centre)].add(-jnp.eye(len(k)))
    return (result**2).sum() - max(0, k.shape[0] - k.shape[1] * np.prod(strides))


def test_the_gradient_is_that_of_the_naive_formula_and_of_finite_differences():
    cases = [((3, 2, 3, 2), 1), ((3, 2, 1, 5), (2, 1)), ((4, 1, 3), 1), ((5, 2, 3), 2)]
    step = 1e-5

    def measure(kernel, direction, strides):
        functions = [functools.partial(f, strides=strides) for f in (penalty, naive)]
        values, gradients = zip(*(jax.value_and_grad(f)(kernel) for f in functions), strict=True)
        ahead, behind = (functions[0](kernel + sign * step * direction) for sign in (1, -1))
        curvatures = [
            jax.jvp(jax.grad(f), (kernel,), (direction,))[1] for f in functions if kernel.ndim == 3
        ]
        return values, gradients, (ahead - behind) / (2 * step), curvatures

    with tolerances.double_precision():
        kernels = [(normal(shape), normal(shape, seed=1)) for shape, _ in cases]
        results = jax.jit(lambda ks: [measure(*k, s) for k, (_, s) in zip(ks, cases, strict=True)])(
            kernels
        )
        results = jax.tree.map(np.asarray, results)
    for (_, direction), (values, gradients, slope, curvatures) in zip(
        kernels, results, strict=True
    ):
        np.testing.assert_allclose(*values, rtol=1e-12)
        np.testing.assert_allclose(*gradients, rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose((gradients[0] * direction).sum(), slope, rtol=1e-7)
        if curvatures:
            np.testing.assert_allclose(*curvatures, rtol=1e-10, atol=1e-12)


def test_the_gradient_with_groups_dilation_and_complex_entries_is_that_of_differences():
    cases = [
        ((2, 2, 2, 4), {"groups": 2, "dilation": 2}, np.float64),
        ((3, 2, 2), {"strides": 2, "dilation": 3}, np.complex128),
        ((2, 1, 3), {}, np.complex128),
        ((3, 3, 2), {"transposed": True, "strides": 2}, np.float64),
        ((3, 1, 2), {"self_padding": 1, "strides": 2}, np.float64),
    ]
    step = 1e-5

    def measure(kernel, direction, options):
        function = functools.partial(convolution_orthogonality, **options)
        ends = function(kernel + step * direction) - function(kernel - step * direction)
        return jax.grad(function)(kernel), ends / (2 * step)

    with tolerances.double_precision():
        kernels = [(normal(s, dtype), normal(s, dtype, seed=1)) for s, _, dtype in cases]
        results = jax.jit(
            lambda ks: [measure(*k, o) for k, (_, o, _) in zip(ks, cases, strict=True)]
        )(kernels)
        results = jax.tree.map(np.asarray, results)
    for (_, direction), (gradient, slope) in zip(kernels, results, strict=True):
        np.testing.assert_allclose((gradient * direction).sum().real, slope, rtol=1e-7)


def test_half_of_the_offsets_are_computed():
    """Those and their negatives have adjoint products: 13 of 25 for 3 x 3."""
    kernel = jnp.ones((3, 3, 4, 5))
    program = jax.make_jaxpr(convolution_orthogonality)(kernel)
    names = [equation.primitive.name for equation in oracles.equations(program.jaxpr)]
    assert "conv_general_dilated" not in names
    assert 1 <= names.count("dot_general") <= 13


# --- dtypes


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_16_bits_are_computed_in_float32(dtype):
    """Entries of 30 have products with a sum beyond the largest float16."""
    kernel = jnp.asarray(30 * normal((3, 60, 3)) * 180**0.5, dtype)
    value = penalty(kernel)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, l_orth(oracles.float64(kernel)), rtol=1e-5)
    small = jnp.asarray(normal((2, 2, 4, 3)), dtype)
    value, gradient = jax.jit(jax.value_and_grad(penalty))(small)
    np.testing.assert_allclose(value, l_orth(oracles.float64(small)), rtol=1e-5)
    assert gradient.dtype == dtype


def test_complex_kernels_give_real_numbers():
    kernel = normal((3, 2, 3), np.complex64)
    value = penalty(kernel)
    assert value.dtype == np.float32
    np.testing.assert_allclose(value, l_orth(oracles.float64(kernel)), rtol=1e-5)


def test_a_nan_is_not_hidden():
    kernel = jnp.asarray(normal((3, 2, 2), np.float32)).at[1, 1, 1].set(jnp.nan)
    assert jnp.isnan(penalty(kernel))


# --- what a small value says about the layer: Achour et al. (2108.05623), stability


BOUNDED = {
    "rows": ((3, 3, 3, 2), 1),
    "square": ((3, 3, 2, 2), 1),
    "columns": ((3, 3, 1, 3), 1),
    "strided rows": ((3, 3, 2, 5), 2),
    "strided columns": ((3, 3, 1, 5), 2),
    "sequence": ((5, 3, 2), 1),
    "sequence, strided columns": ((3, 2, 7), 3),
}


@pytest.mark.parametrize("layer", BOUNDED)
def test_it_bounds_the_singular_values_at_every_input_size(layer):
    rng = np.random.default_rng(0)
    shape, stride = BOUNDED[layer]
    *size, inputs, outputs = shape
    axes, taps = len(size), size[0]
    rows = outputs <= inputs * stride**axes
    if rows:
        factor = outputs * (2 * ((taps - 1) // stride) + 1) ** axes
    else:
        factor = inputs * (2 * taps - 1) ** axes
    exact = orthogonal_kernel(rng, shape, stride)
    kernels = [exact + noise * normal(shape, seed=1) for noise in (0.0, 1e-4, 1e-2, 0.1, 1.0)]
    kernels += [scale * normal(shape, seed=2) for scale in (0.3, 1.0, 3.0)]
    with tolerances.double_precision():
        values = np.array([penalty(kernel, stride) for kernel in kernels])
    informative = 0
    for kernel, value in zip(kernels, values, strict=True):
        error = np.sqrt(factor * max(value, 0))
        informative += error < 1
        for count in (1, 2, 5):
            matrix = circular(kernel, count, stride)
            matrix = matrix if len(matrix) <= matrix.shape[1] else matrix.T
            squares = np.linalg.eigvalsh(matrix @ matrix.T)
            assert 1 - error - 1e-12 <= squares.min()
            assert squares.max() <= 1 + error + 1e-12
    assert informative >= 3


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((3, 3, 4, 6), 2), ((2, 3, 2, 4), 1), ((5, 4, 3), 1)],
    ids=["rows", "columns", "sequence"],
)
def test_descent_on_it_makes_the_layer_orthogonal(shape, strides):
    kernel = jnp.asarray(normal(shape, np.float32))
    tx = optax.adam(optax.cosine_decay_schedule(0.03, 1000))

    def step(carry, _):
        kernel, state = carry
        gradient = jax.grad(convolution_orthogonality)(kernel, strides)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(kernel, updates), state), None

    run = jax.jit(lambda k: jax.lax.scan(step, (k, tx.init(k)), length=1000)[0][0])
    before, kernel = np.asarray(kernel), np.asarray(run(kernel))
    assert l_orth(oracles.float64(before), strides) > 0.1
    assert l_orth(oracles.float64(kernel), strides) < 1e-5
    s = np.linalg.svd(circular(oracles.float64(kernel), 5, strides), compute_uv=False)
    assert s.min() > 0.99
    assert s.max() < 1.01


# --- existence


def lost_to_padding(taps, stride, dilation, pads, size):
    """The taps of one axis that some window loses, and those that some input position loses."""
    layout = windows(size, taps, stride, dilation, pads)
    for_rows, for_columns = set(), set()
    before = 0 if pads is None else pads[0]
    for tap in range(taps):
        reached = {window[tap] for window in layout}
        if None in reached:
            for_rows.add(tap)
        residue = (tap * dilation - before) % stride
        if not reached >= {x for x in range(size) if x % stride == residue}:
            for_columns.add(tap)
    return for_rows, for_columns


def constructed(rng, layer):
    """An orthogonal kernel of one tap per residue, and which side is orthonormal; or None."""
    taps, strides, dilation, pads, size, inputs, outputs, groups = layer
    axes = list(zip(taps, strides, dilation, pads, size, strict=True))
    for side, most in (("rows", True), ("columns", False)):
        if outputs != inputs * np.prod(strides) and (most != (outputs < inputs * np.prod(strides))):
            continue
        lost = [lost_to_padding(*axis)[0 if most else 1] for axis in axes]
        kept = [
            by_residue([t for t in range(k) if t not in out], s, d)
            for (k, s, d, *_), out in zip(axes, lost, strict=True)
        ]
        residues = int(np.prod([len(axis) for axis in kept]))
        if residues < (outputs / inputs if most else np.prod(strides)):
            continue
        return side, one_tap_per_residue(rng, kept, inputs, outputs, groups, size=taps)
    return None


def defect_of(matrix, side):
    return squared_distance(matrix @ matrix.T if side == "rows" else matrix.T @ matrix)


def matrix_of(layer, kernel):
    _, strides, dilation, pads, size, _, _, groups = layer
    return operator(kernel, size, strides, pads, dilation, groups)


def smallest_defect(rng, layer, starts=2):
    """Least squared distance from orthonormal, by descent over all kernels, of either side.

    The matrix is linear in the kernel: A = sum_j x_j B_j, and the slope 4 <(A A^T - I) A, B_j>.
    """
    taps, strides, _, _, _, inputs, outputs, groups = layer
    shape = (*taps, inputs // groups, outputs)
    entries = int(np.prod(shape))
    basis = np.stack([matrix_of(layer, unit.reshape(shape)) for unit in np.eye(entries)])
    if outputs > inputs * np.prod(strides):
        basis = basis.swapaxes(1, 2)
    sides = [basis]
    if outputs == inputs * np.prod(strides):
        sides.append(basis.swapaxes(1, 2))

    def loss(x, basis):
        a = np.tensordot(x, basis, 1)
        excess = a @ a.T - np.eye(len(a))
        return (excess**2).sum(), 4 * np.tensordot(basis, excess @ a, 2)

    return min(
        scipy.optimize.minimize(
            loss, rng.standard_normal(entries) / 2, (side,), jac=True, method="L-BFGS-B"
        ).fun
        for side in sides
        for _ in range(starts)
    )


def pads_of(padding, size, taps, stride, dilation):
    """Zeros before and after one axis, as XLA and Flax have them."""
    extent = (taps - 1) * dilation + 1
    if padding == "SAME":
        total = max((-(-size // stride) - 1) * stride + extent - size, 0)
        return total // 2, total - total // 2
    if isinstance(padding, int):
        return padding, padding
    return {"CIRCULAR": None, "VALID": (0, 0), "CAUSAL": (extent - 1, 0)}.get(padding, padding)


def long_input(padding, taps, stride, dilation):
    """A size of several kernels at which the windows end with the padded input."""
    extent = (taps - 1) * dilation + 1
    sizes = range(3 * max(extent, stride), 6 * max(extent, stride))
    if padding in ("SAME", "CIRCULAR"):
        return next(n for n in sizes if n % stride == 0)
    before, after = pads_of(padding, 0, taps, stride, dilation)
    return next(n for n in sizes if (n + before + after - extent) % stride == 0)


def layer_of(taps, strides, dilation, padding, inputs, outputs, groups, size=None):
    axes = list(zip(taps, strides, dilation, padding, strict=True))
    if size is None:
        size = tuple(long_input(p, k, s, d) for k, s, d, p in axes)
    pads = [pads_of(p, n, k, s, d) for (k, s, d, p), n in zip(axes, size, strict=True)]
    return taps, strides, dilation, pads, size, inputs, outputs, groups


PADDINGS = ["CIRCULAR", "SAME", "VALID", "CAUSAL", 1, 2, (0, 1), (2, 1), (0, 4)]
CHANNELS = [(1, 1, 1), (1, 2, 1), (2, 1, 1), (1, 3, 1), (2, 3, 1), (3, 2, 1), (2, 4, 2), (2, 2, 2)]


def sequences():
    """Layers with one axis, without and with an input size: arguments and the layer."""
    for padding in PADDINGS:
        for k, s, d in itertools.product((1, 2, 3, 4), (1, 2, 3), (1, 2)):
            for inputs, outputs, groups in CHANNELS:
                options = {
                    "padding": padding if isinstance(padding, str | int) else [padding],
                    "dilation": d,
                    "groups": groups,
                }
                arguments = (k, s, inputs, outputs), options
                parts = (k,), (s,), (d,), (padding,), inputs, outputs, groups
                yield arguments, layer_of(*parts)
                least = 3 * max((k - 1) * d + 1, s)
                for n in range(least, least + s):
                    if padding != "CIRCULAR" or n % s == 0:
                        options = options | {"input_size": n}
                        yield ((k, s, inputs, outputs), options), layer_of(*parts, (n,))


def planes():
    """Layers with two axes."""
    for padding in ["CIRCULAR", "SAME", "VALID", (1, 1), (0, (0, 1)), ((1, 0), (0, 1))]:
        for k, s in [
            ((2, 2), 1),
            ((3, 2), (1, 2)),
            ((2, 3), 2),
            ((3, 3), (2, 1)),
            ((1, 2), (2, 1)),
        ]:
            for inputs, outputs, groups in [(1, 1, 1), (1, 2, 1), (1, 4, 1), (2, 5, 1), (2, 2, 2)]:
                parts = (
                    k, per_axis(s, 2), (1, 1), per_axis(padding, 2), inputs, outputs, groups
                )  # fmt: skip
                options = {"padding": padding, "groups": groups}
                yield ((k, s, inputs, outputs), options), layer_of(*parts)


@pytest.mark.parametrize("layers", [sequences, planes])
def test_the_answer_is_whether_a_kernel_of_one_tap_per_residue_can_be_built(layers):
    """For every third answer of yes the built kernel is checked on the matrix of the layer."""
    rng = np.random.default_rng(0)
    answers = {True: 0, False: 0}
    for (arguments, options), layer in layers():
        answer = orthogonal_convolution_exists(*arguments, **options)
        assert isinstance(answer, bool)
        found = constructed(rng, layer)
        assert answer == (found is not None), (arguments, options)
        answers[answer] += 1
        if found and answers[True] % 3 == 0:
            side, kernel = found
            assert defect_of(matrix_of(layer, kernel), side) < 1e-20, (arguments, options)
    assert min(answers.values()) > 40


def small_layers(rng, *, answer, count):
    """Some of those with few entries for which the library gives this answer."""
    layers = [
        layer
        for (arguments, options), layer in sequences()
        if layer[4][0] <= 12
        if orthogonal_convolution_exists(*arguments, **options) == answer
    ]
    return [layers[i] for i in rng.permutation(len(layers))[:count]]


def test_where_the_answer_is_no_descent_does_not_find_one_either():
    rng = np.random.default_rng(0)
    for layer in small_layers(rng, answer=False, count=25):
        assert smallest_defect(rng, layer) > 0.3, layer


def test_where_the_answer_is_yes_descent_mostly_finds_one():
    """So that its failures above mean something."""
    rng = np.random.default_rng(0)
    defects = [smallest_defect(rng, layer) for layer in small_layers(rng, answer=True, count=12)]
    assert np.mean(np.array(defects) < 1e-6) > 0.7


def test_with_circular_padding_it_is_the_published_condition():
    """Achour et al. (2108.05623): M <= C k^2 in the row case, S <= k in the column case."""
    for k, s, inputs, outputs in itertools.product(
        range(1, 5), range(1, 5), (1, 2, 3), range(1, 50)
    ):
        for axes in (1, 2):
            rows = outputs <= inputs * s**axes and outputs <= inputs * k**axes
            columns = outputs >= inputs * s**axes and s <= k
            size = k if axes == 1 else (k, k)
            assert orthogonal_convolution_exists(size, s, inputs, outputs) == (rows or columns)


def test_without_padding_columns_need_a_kernel_as_long_as_the_stride():
    """Achour et al. (2108.05623), padding "valid": no column case for k > 1 at stride 1."""
    for k, s in itertools.product(range(1, 5), range(1, 5)):
        for size in (k, (k, k)):
            axes = 1 if size == k else 2
            more, fewer = 2 * s**axes + 1, 1
            exists = functools.partial(orthogonal_convolution_exists, size, s, 2, padding="VALID")
            assert exists(out_channels=more) == (k == s)
            assert exists(out_channels=fewer)


def test_with_padding_to_the_same_size_and_no_stride_only_one_tap_is_left():
    """The centre; so no more outputs than inputs, and the answer is of no use (2108.05623)."""
    for k in range(1, 6):
        for size in (k, (k, k)):
            for inputs, outputs in [(2, 1), (2, 2), (2, 3)]:
                exists = orthogonal_convolution_exists(size, 1, inputs, outputs, padding="SAME")
                assert exists
    for k in (2, 3, 4):
        layer = layer_of((k,), (1,), (1,), ("SAME",), 2, 2, 1)
        losses = [lost_to_padding(k, 1, 1, *pad_size) for pad_size in [(layer[3][0], layer[4][0])]]
        assert [len(lost) for lost in losses[0]] == [k - 1, k - 1]


def test_an_image_that_the_windows_do_not_exhaust_has_no_orthonormal_columns():
    exists = functools.partial(orthogonal_convolution_exists, 2, 2, 1, 2, padding="VALID")
    assert exists()
    assert exists(input_size=20)
    assert exists(input_size=21)  # its rows still are
    exists = functools.partial(orthogonal_convolution_exists, 2, 2, 1, 3, padding="VALID")
    assert exists(input_size=20)
    assert not exists(input_size=21)


def test_numbers_may_be_given_per_axis_or_once():
    exists = orthogonal_convolution_exists
    for s in (1, 2, 3):
        for padding in (0, 1):
            once = exists((2, 2), s, 2, 9, padding=padding, dilation=1, input_size=12)
            pairs = [(padding, padding)] * 2
            assert once == exists(
                (2, 2), (s, s), 2, 9, padding=pairs, dilation=(1, 1), input_size=(12, 12)
            )
    assert exists((3,), (2,), 1, 2) == exists(3, 2, 1, 2)


def test_a_circle_that_the_strides_do_not_divide_is_refused_or_not_orthogonal():
    """Of 7 pixels, 4 windows of 3 at stride 2: the last and the first share a pixel more."""
    layer = ((3,), (2,), (1,), [None], (7,), 2, 4, 1)
    assert smallest_defect(np.random.default_rng(0), layer) > 0.3
    try:
        assert not orthogonal_convolution_exists(3, 2, 2, 4, input_size=7)
    except ValueError as error:
        assert re.search(says("orthogonal_convolution_exists", "input_size", "7"), str(error))

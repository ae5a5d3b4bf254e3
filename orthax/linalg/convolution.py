"""A convolution as a linear operator: its matrix, and its singular values."""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from orthax.base import check
from orthax.base.leaves import check_array, value_of
from orthax.linalg.elementary import wide

PADDINGS = ("CIRCULAR", "SAME", "VALID", "CAUSAL")
_SPATIAL = {3: "W", 4: "HW"}
PerAxis: TypeAlias = int | Iterable[int]
Padding: TypeAlias = str | int | Sequence[int | Sequence[int]]


class Geometry(NamedTuple):
    """The checked shape of a convolution; one entry per spatial axis where it is a tuple."""

    kernel_size: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    inputs: int  # channels of one group
    outputs: int  # channels of one group

    @property
    def extent(self) -> tuple[int, ...]:
        """Entries from the first to the last tap."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True))


def geometry_of(
    call: str, kernel: jax.Array, strides: PerAxis, dilation: PerAxis, groups: int
) -> Geometry:
    """Geometry of a layer with a kernel (*spatial, inputs / groups, outputs), or raises."""
    kernel = value_of(kernel)
    check_array(call, kernel, "kernel")
    if kernel.ndim not in _SPATIAL:
        accepted = (
            "(width, in / groups, out) and (height, width, in / groups, out), as Flax has them"
        )
        raise ValueError(f"{call}: kernel has shape {kernel.shape}; accepted are {accepted}.")
    *size, inputs, outputs = kernel.shape
    groups = check.integer(f"{call}: groups", groups)
    return make_geometry(call, size, strides, dilation, groups, groups * inputs, outputs)


def make_geometry(
    call: str,
    size: PerAxis,
    strides: PerAxis,
    dilation: PerAxis,
    groups: int,
    inputs: int,
    outputs: int,
) -> Geometry:
    """Geometry of a layer with the given channels, or raises."""
    entries = _entries(size)
    sizes = (size,) if entries is None else entries
    if len(sizes) + 2 not in _SPATIAL:
        raise ValueError(f"{call}: kernel_size must name one or two axes, got {size!r}.")
    taps = tuple(check.integer(f"{call}: kernel_size", k) for k in sizes)
    groups = check.integer(f"{call}: groups", groups)
    for name, channels in {"in_channels": inputs, "out_channels": outputs}.items():
        if check.integer(f"{call}: {name}", channels) % groups:
            got = f"{groups} groups for {name} = {channels}"
            raise ValueError(f"{call}: groups must divide the channels, got {got}.")
    return Geometry(
        taps,
        per_axis(call, "strides", strides, len(taps)),
        per_axis(call, "dilation", dilation, len(taps)),
        groups,
        inputs // groups,
        outputs // groups,
    )


def per_axis(call: str, argument: str, x: PerAxis, axes: int) -> tuple[int, ...]:
    """One integer of at least 1 for each spatial axis, or raises."""
    entries = _entries(x)
    entries = (x,) * axes if entries is None else entries
    if len(entries) != axes:
        accepted = f"an integer or {axes} of them, one per spatial axis"
        raise ValueError(f"{call}: {argument} must be {accepted}, got {x!r}.")
    return tuple(check.integer(f"{call}: {argument}", entry) for entry in entries)


def pads_of(
    call: str, padding: Padding, geometry: Geometry, input_size: tuple[int, ...] | None
) -> list[tuple[int, int]] | None:
    """Zeros before and after each spatial axis; None for circular padding.

    Without an input size, inputs count as multiples of the stride.
    """
    axes = len(geometry.kernel_size)
    known = (
        f'{call}: padding must be "CIRCULAR", "SAME", "VALID", "CAUSAL" (for one axis), an '
        "integer, or one integer or pair of integers of at least 0 per spatial axis"
    )
    if isinstance(padding, str):
        if padding not in PADDINGS or (padding == "CAUSAL" and axes > 1):
            raise ValueError(f"{known}, got {padding!r}.")
        if padding == "CIRCULAR":
            return None
        if padding == "VALID":
            return [(0, 0)] * axes
        if padding == "CAUSAL":
            return [(geometry.extent[0] - 1, 0)]
        # Any multiple of the stride is padded alike; this one has room for a window.
        sizes = input_size or np.multiply(geometry.strides, geometry.extent).tolist()
        return lax.padtype_to_pads(sizes, geometry.extent, geometry.strides, "SAME")
    entries = _entries(padding)
    entries = (padding,) * axes if entries is None else entries
    pairs = [(p, p) if _entries(p) is None else _entries(p) for p in entries]
    whole = functools.partial(check.integer, "padding", interval="[0, inf)")
    try:
        checked: Any = [tuple(map(whole, pair or ())) for pair in pairs]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{known}, got {padding!r}.") from error
    if len(checked) != axes or any(len(pair) != 2 for pair in checked):
        raise ValueError(f"{known}, got {padding!r}.")
    return checked


def _entries(x: Any) -> tuple[Any, ...] | None:
    """The entries of a sequence; None for what is none, such as a string or a 0-d array."""
    if isinstance(x, str) or not isinstance(x, Iterable) or getattr(x, "ndim", 1) == 0:
        return None
    return tuple(x)


def check_circle(call: str, geometry: Geometry, size: tuple[int, ...]) -> None:
    """Raises unless windows go round an input of the given size in whole strides."""
    if any(n % s for n, s in zip(size, geometry.strides, strict=True)):
        accepted = f"a multiple of the strides {geometry.strides}"
        argument = f"{call}: with circular padding, input_size"
        raise ValueError(f"{argument} must be {accepted}, got {size}.")


def convolution_matrix(
    kernel: jax.Array,
    input_size: int | tuple[int, ...],
    strides: int | tuple[int, ...] = 1,
    *,
    padding: Padding = "CIRCULAR",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> jax.Array:
    r"""The matrix of a convolution layer: `y.ravel() == matrix @ x.ravel()` for one image x.

    With an entry per output and input it is for small sizes. A transposed layer has the transpose.

    Args:
      kernel: As in Flax, shape (height, width, in / groups, out) or (width, in / groups, out).
      input_size: Height and width of x, or one number for both; x has shape (height, width, in).
      strides: Of the window, one number or one per axis.
      padding: "CIRCULAR", "SAME", "VALID", "CAUSAL" (one axis), or integers or pairs as in Flax.
      dilation: Of the kernel.
      groups: Feature groups.

    Returns:
      Shape (outputs, inputs), both in row-major order with channels last; dtype of the kernel.

    Raises:
      ValueError: For a kernel of another rank, an unknown padding, groups that do not divide the
        channels, sizes that do not fit the spatial axes; TypeError: for a kernel that is not
        floating, or sizes that are no integers.

    Example:
      >>> print(convolution_matrix(jnp.array([1.0, 2.0]).reshape(2, 1, 1), 3))
      [[1. 2. 0.]
       [0. 1. 2.]
       [2. 0. 1.]]
    """
    call = "convolution_matrix"
    geometry = geometry_of(call, kernel, strides, dilation, groups)
    size = per_axis(call, "input_size", input_size, len(geometry.kernel_size))
    return _matrix(call, jnp.asarray(value_of(kernel)), size, geometry, padding)


def convolution_singular_values(
    kernel: jax.Array,
    input_size: int | tuple[int, ...],
    strides: int | tuple[int, ...] = 1,
    *,
    padding: Padding = "CIRCULAR",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> jax.Array:
    r"""Singular values of a convolution layer as a linear operator on images.

    With circular padding the operator acts on each frequency by itself: a stride of S folds S
    frequencies of the input per axis onto one of the output. That takes one small decomposition per
    frequency of the output. Other paddings decompose `convolution_matrix` and are for small sizes.
    Reference: Sedghi, Gupta and Long, The Singular Values of Convolutional Layers, 2018,
    <https://arxiv.org/abs/1805.10408>.

    Args:
      kernel: As in Flax, shape (height, width, in / groups, out) or (width, in / groups, out).
      input_size: Height and width of the input, or one number for both; with circular padding
        multiples of the strides.
      strides: Of the window, one number or one per axis.
      padding: As in `convolution_matrix`.
      dilation: Of the kernel.
      groups: Feature groups.

    Returns:
      All min(inputs, outputs) of them, decreasing; float32 for 16-bit kernels, else their
      precision. The first is the layer's Lipschitz constant.

    Raises:
      ValueError: As `convolution_matrix`, and for circular padding with an input size that is no
        multiple of the strides; TypeError: as `convolution_matrix`.

    Example:
      >>> kernel = jnp.array([1.0, 1.0]).reshape(2, 1, 1)  # sums of neighbours
      >>> print(convolution_singular_values(kernel, 4).round(3) + 0.0)
      [2.    1.414 1.414 0.   ]
    """
    call = "convolution_singular_values"
    geometry = geometry_of(call, kernel, strides, dilation, groups)
    size = per_axis(call, "input_size", input_size, len(geometry.kernel_size))
    kernel = wide(jnp.asarray(value_of(kernel)))
    if pads_of(call, padding, geometry, size) is None:
        check_circle(call, geometry, size)
        matrices = _matrices_by_frequency(kernel, size, geometry)
    else:
        matrices = _matrix(call, kernel, size, geometry, padding)
    values = jnp.linalg.svd(matrices, compute_uv=False)
    return jnp.sort(values.ravel(), descending=True)


def _matrices_by_frequency(
    kernel: jax.Array, size: tuple[int, ...], geometry: Geometry
) -> jax.Array:
    """Shape (groups, *frequencies, outputs, inputs * strides); unitarily equal to the operator."""
    axes = tuple(range(len(size)))
    # The layer multiplies frequency f of an image by the block sum_t kernel[t] exp(2 pi i f t / n),
    # outputs by inputs: the inverse Fourier transform of the kernel on a circle of the size of the
    # image, but for its factor. Taps that go round the circle add up.
    taps = itertools.product(*(range(k) for k in geometry.kernel_size))
    placed = jnp.zeros((*size, *kernel.shape[-2:]), kernel.dtype)
    for tap in taps:
        where = tuple(t * d % n for t, d, n in zip(tap, geometry.dilation, size, strict=True))
        placed = placed.at[where].add(kernel[tap])
    spectrum = jnp.fft.ifftn(placed, axes=axes) * math.prod(size)
    # A stride of s keeps every s-th output, to which the s frequencies g + a n / s look the same.
    # So their blocks stand side by side in one, and each has lost a factor of sqrt(s).
    folded = [part for n, s in zip(size, geometry.strides, strict=True) for part in (s, n // s)]
    spectrum = spectrum.reshape(*folded, geometry.inputs, geometry.groups, geometry.outputs)
    aliases, frequencies = [2 * a for a in axes], [2 * a + 1 for a in axes]
    at = 2 * len(axes)  # of the input channels; groups and output channels follow
    spectrum = spectrum.transpose(at + 1, *frequencies, at + 2, *aliases, at)
    shape = (*spectrum.shape[: len(axes) + 2], -1)
    return spectrum.reshape(shape) * math.prod(geometry.strides) ** -0.5


def _matrix(
    call: str, kernel: jax.Array, size: tuple[int, ...], geometry: Geometry, padding: Padding
) -> jax.Array:
    # The layer applied to every unit image: as a batch, one image per column of the matrix.
    inputs = geometry.groups * geometry.inputs
    count = math.prod(size) * inputs
    images = jnp.eye(count, dtype=kernel.dtype).reshape(count, *size, inputs)
    pads = pads_of(call, padding, geometry, size)
    if pads is None:
        # As Flax pads with "CIRCULAR": the window is centred, the odd entry at the end.
        before_after = [((e - 1) // 2, e // 2) for e in geometry.extent]
        images = jnp.pad(images, [(0, 0), *before_after, (0, 0)], mode="wrap")
        pads = [(0, 0)] * len(size)
    spatial = _SPATIAL[kernel.ndim]
    outputs = lax.conv_general_dilated(
        images,
        kernel,
        geometry.strides,
        pads,
        rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
        feature_group_count=geometry.groups,
        precision=lax.Precision.HIGHEST,
    )
    return outputs.reshape(count, -1).T

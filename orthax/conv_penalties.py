r"""Orthogonality of convolutions: the penalty L_orth of a kernel, and when it can be zero at all.

A convolution is orthogonal if its matrix, from images to outputs, has orthonormal rows or columns;
the kernel as a matrix says little about that.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from orthax.base import check
from orthax.base.leaves import value_of
from orthax.linalg import convolution
from orthax.linalg.elementary import abs_square, less_identity, wide

__all__ = ["convolution_orthogonality", "orthogonal_convolution_exists"]


def __dir__() -> list[str]:
    return __all__


def convolution_orthogonality(
    kernel: jax.Array,
    strides: int | tuple[int, ...] = 1,
    *,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    transposed: bool = False,
    self_padding: int | None = None,
) -> jax.Array:
    r"""Penalty L_orth on a convolution kernel: how far the layer is from orthogonal.

    Take a layer with C channels in and M out, stride S and k by k taps (the extent, if dilated) on
    circularly padded images, with N by N outputs per channel, and its matrix A from all inputs to
    all outputs. At any input size, from N S >= 2 k - 1 on:

    - row case, M <= C S^2, no more outputs than inputs: the penalty is
      :math:`\|A A^T - I\|_F^2 / N^2`, zero iff the rows of A are orthonormal;
    - column case, M > C S^2: it is :math:`\|A^T A - I\|_F^2 / N^2`, zero iff the columns are.

    From the kernel alone, :math:`L = \sum_d \|\sum_p K_{p+d}^T K_p - \delta_{d0} I\|_F^2` with
    :math:`K_p` the C by M matrix of tap p and d the multiples of S: the overlap of the kernel with
    itself moved by d. In the column case, where rows are too many to be orthonormal, the least L is
    M - C S^2, and that is taken off. A penalty of P confines all singular values of A to
    :math:`[\sqrt{1 - e}, \sqrt{1 + e}]`, :math:`e^2 = a P`, with a = M (2 floor((k - 1) / S) + 1)^2
    in the row case and C (2 k - 1)^2 in the column case (first powers, with one spatial axis).

    One product per offset: on CPU, from 64 channels on, 1.4 to 3 times as fast as the convolution
    of the kernel with itself, and its gradient 6 to 70 times (benchmarks/penalties.py).
    Reference: Wang et al., Orthogonal Convolutional Neural Networks, 2020,
    <https://arxiv.org/abs/1911.12207>; Achour, Malgouyres and Mamalet, Existence, Stability and
    Scalability of Orthogonal Convolutional Neural Networks, 2021,
    <https://arxiv.org/abs/2108.05623>, definition 3 and theorems 2 to 4.

    Args:
      kernel: As in Flax, shape (height, width, in / groups, out) or (width, in / groups, out).
      strides: Of the layer, S; one number or one per axis.
      dilation: Of the kernel.
      groups: Feature groups; the sum over groups is taken.
      transposed: Whether the layer is `flax.nnx.ConvTranspose`, whose kernel has inputs and outputs
        the other way round, unless `transpose_kernel=True`.
      self_padding: None for the above. A number pads the kernel with as many zeros on every side
        when it is convolved with itself, and no constant is taken off: k // 2 is Wang et al.'s
        code. Larger offsets are left out: zero for some layers that are not orthogonal.

    Returns:
      Scalar, float32 for 16-bit input, else the precision of the kernel; at least 0 but for
      rounding, and 0 iff the layer is orthogonal: see `orthogonal_convolution_exists`.

    Raises:
      ValueError: If the kernel has another rank, `groups` does not divide its outputs or is more
        than 1 for a transposed layer, or `strides`, `dilation` or `self_padding` is out of range.
      TypeError: If the kernel is not floating, or a size no integer.

    Example:
      >>> shift = jnp.zeros((3, 3, 2, 2)).at[0, 2].set(jnp.eye(2))
      >>> print(convolution_orthogonality(shift), convolution_orthogonality(2 * shift))
      0.0 18.0
    """
    call, kernel = "convolution_orthogonality", value_of(kernel)
    check.flag(f"{call}: transposed", transposed)
    if transposed and getattr(kernel, "ndim", 0) > 1:
        if check.integer(f"{call}: groups", groups) != 1:
            raise ValueError(f"{call}: a transposed layer has one group, got groups={groups!r}.")
        # The kernel of the convolution whose transpose is the layer, but for a reflection.
        kernel = jnp.swapaxes(kernel, -1, -2)
    geometry = convolution.geometry_of(call, kernel, strides, dilation, groups)
    if self_padding is not None:
        check.integer(f"{call}: self_padding", self_padding, "[0, inf)")
    # A A^T consists of one M by M block for every pair of output positions, which depends on their
    # distance only: each column of blocks is the sum below, and there are N^2 of them.
    kernel = wide(jnp.asarray(kernel))
    shape = (*geometry.kernel_size, geometry.inputs, geometry.groups, geometry.outputs)
    kernel = kernel.reshape(shape)
    total = jnp.zeros([], kernel.real.dtype)
    for offset, centre, weight in _offsets(geometry, self_padding):
        product = _correlation(kernel, offset)
        if centre:
            product = less_identity(product)
        total += weight * jnp.sum(abs_square(product))
    if self_padding is not None:
        return total
    # Of M rows per output position C S^2 at most are independent. The others leave that many
    # eigenvalues 0 in A A^T: |A A^T - I|_F^2 = |A^T A - I|_F^2 + N^2 (M - C S^2).
    rank = geometry.inputs * math.prod(geometry.strides)
    return total - geometry.groups * max(0, geometry.outputs - rank)


def orthogonal_convolution_exists(
    kernel_size: int | tuple[int, ...],
    strides: int | tuple[int, ...],
    in_channels: int,
    out_channels: int,
    *,
    padding: convolution.Padding = "CIRCULAR",
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    input_size: int | tuple[int, ...] | None = None,
) -> bool:
    r"""Whether any kernel of the given shape makes the layer orthogonal.

    Zeros outside the image cut windows off. A tap that is cut off in one row or column but not in
    another must be zero if all are orthonormal. Let T be, on each axis, the taps that are left: all
    with circular padding; for rows, those that no window loses; for columns, those that no input
    position loses. Let R be the product over axes of the number of distinct remainders of their
    positions modulo the stride S. Rows can be orthonormal (M <= C S^2) iff M <= C R, and columns (M
    >= C S^2) iff R is the product of the strides: both by a kernel with one tap per remainder.

    Undilated and with circular padding that is the published condition: M <= C k^2 for rows, S <= k
    for columns. Without padding it rules out columns unless k = S. With "SAME" and stride 1 only a
    kernel with a single tap is orthogonal, which is no convolution.
    Reference: Achour, Malgouyres and Mamalet, 2021, <https://arxiv.org/abs/2108.05623>, theorem 1
    and propositions 1 and 2. The condition for strides, dilation and any padding is derived here.

    Args:
      kernel_size: Taps k; an integer for one spatial axis, or a pair.
      strides: S, one number or one per axis.
      in_channels: C, of all groups.
      out_channels: M, of all groups.
      padding: As in `flax.nnx.Conv`; see `orthax.linalg.convolution_matrix`.
      dilation: Of the kernel.
      groups: Feature groups.
      input_size: Height and width of the input, where "SAME" or leftover inputs depend on it; with
        circular padding, multiples of the strides. None: the windows end with the (padded) input.
        It counts as long: several times the kernel.

    Returns:
      A Python bool.

    Raises:
      ValueError: For an unknown padding, groups that do not divide the channels, or sizes that are
        less than 1 or do not fit the number of axes; TypeError: for sizes that are no integers.

    Example:
      >>> orthogonal_convolution_exists((3, 3), 1, 16, 32)
      True
      >>> orthogonal_convolution_exists((3, 3), 1, 16, 32, padding="VALID")
      False
      >>> orthogonal_convolution_exists((3, 3), 4, 2, 32)  # 18 < 32 <= 2 * 4**2
      False
    """
    call = "orthogonal_convolution_exists"
    geometry = convolution.make_geometry(
        call, kernel_size, strides, dilation, groups, in_channels, out_channels
    )
    axes = len(geometry.kernel_size)
    size = (
        None if input_size is None else convolution.per_axis(call, "input_size", input_size, axes)
    )
    pads = convolution.pads_of(call, padding, geometry, size)
    if pads is None and size is not None:
        convolution.check_circle(call, geometry, size)
    lengths: Any = (None,) * axes if size is None else size
    by_rows, by_columns = [], []
    for axis in range(axes):
        k, s, d = geometry.kernel_size[axis], geometry.strides[axis], geometry.dilation[axis]
        last = geometry.extent[axis] - 1
        rows = columns = range(0, last + 1)
        if pads is not None:
            low, high = pads[axis]
            if lengths[axis] is not None:
                high -= (lengths[axis] + low + high - last - 1) % s
            # The first window loses taps over `low` zeros before the image, the last over `high`.
            rows = range(low, last - max(high, 0) + 1)
            # Windows start at every s-th entry of the padded image, from its first. So the first s
            # pixels are met by taps up to low + s - 1 only, and the last s likewise.
            columns = range(max(0, last - high - s + 1), min(last, low + s - 1) + 1)
        # Taps with distinct remainders fall on distinct classes of pixels: kernels with one tap for
        # each have no overlaps with themselves moved by the stride.
        taps = range(0, k * d, d)
        by_rows.append(len({tap % s for tap in taps if tap in rows}))
        by_columns.append(len({tap % s for tap in taps if tap in columns}))
    rank = geometry.inputs * math.prod(geometry.strides)
    if geometry.outputs <= rank and geometry.outputs <= geometry.inputs * math.prod(by_rows):
        return True
    return geometry.outputs >= rank and tuple(by_columns) == geometry.strides


def _offsets(
    geometry: convolution.Geometry, self_padding: int | None
) -> list[tuple[tuple[int, ...] | None, bool, int]]:
    """Offsets in taps, whether it is the one for the identity, and how often it counts.

    An offset of no pair of taps is None. Without self-padding one stands for its negative too.
    """
    if self_padding is None:
        ranges = []
        for k, s, d in zip(geometry.kernel_size, geometry.strides, geometry.dilation, strict=True):
            # Taps lie d apart, and offsets are multiples of s and d: in taps, of s / gcd(s, d).
            step = s // math.gcd(s, d)
            reach = (k - 1) // step * step
            ranges.append(range(-reach, reach + 1, step))
        # Weight 2: the product for -d is the adjoint of that for d and has the same norm.
        zero = (0,) * len(ranges)
        return [
            (offset, offset == zero, 1 if offset == zero else 2)
            for offset in itertools.product(*ranges)
            if offset >= zero
        ]
    ranges = [range(-self_padding, self_padding + 1, s) for s in geometry.strides]
    centre = tuple(r[len(r) // 2] for r in ranges)
    # Where the filter stands between dilated taps the product is zero, but at the centre the
    # identity is taken off all the same: so these positions are listed too.
    found = []
    for position in itertools.product(*ranges):
        divided = [divmod(p, d) for p, d in zip(position, geometry.dilation, strict=True)]
        between = any(rest for _, rest in divided)
        offset = None if between else tuple(whole for whole, _ in divided)
        found.append((offset, position == centre, 1))
    return found


def _correlation(kernel: jax.Array, offset: tuple[int, ...] | None) -> jax.Array:
    """Sum over taps p of kernel[p + offset]^H kernel[p], per group; zero where there are none.

    Kernel of shape (*spatial, inputs, groups, outputs), result (groups, outputs, outputs).
    """
    groups, outputs = kernel.shape[-2:]
    size = kernel.shape[:-3]
    if offset is None or any(abs(o) >= k for o, k in zip(offset, size, strict=True)):
        return jnp.zeros((groups, outputs, outputs), kernel.dtype)
    # Along each axis, the parts of the kernel and of its moved copy that overlap.
    pairs = list(zip(offset, size, strict=True))
    moved = kernel[tuple(slice(max(o, 0), k + min(o, 0)) for o, k in pairs)]
    fixed = kernel[tuple(slice(max(-o, 0), k + min(-o, 0)) for o, k in pairs)]
    moved, fixed = (x.reshape(-1, groups, outputs) for x in (moved, fixed))
    if groups == 1:
        moved, fixed = moved[:, 0], fixed[:, 0]
        return jnp.matmul(moved.T.conj(), fixed, precision=lax.Precision.HIGHEST)[None]
    return jnp.einsum("cgm,cgn->gmn", moved.conj(), fixed, precision=lax.Precision.HIGHEST)

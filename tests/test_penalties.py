import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.linalg
import scipy.optimize
import scipy.special
import tolerances
from helpers import normal

from orthax.penalties import (
    WithMemory,
    double_soft_orthogonality,
    lambda_orthogonality,
    mutual_coherence,
    soft_orthogonality,
    spectral_restricted_isometry,
    warm_spectral_restricted_isometry,
)

RADIUS, SHARPNESS = 3.0, 0.7
CONVERGED = 300  # steps after which the power iteration has the norm of a small matrix

PENALTIES = {
    "soft": soft_orthogonality,
    "double": double_soft_orthogonality,
    "coherence": mutual_coherence,
    "isometry": functools.partial(spectral_restricted_isometry, steps=CONVERGED),
    "lambda": functools.partial(lambda_orthogonality, radius=RADIUS, sharpness=SHARPNESS),
}
every_penalty = pytest.mark.parametrize("name", PENALTIES)


def adjoint(x):
    return oracles.mT(x).conj()


# --- formulas of Bansal et al. (1810.09102) and Ricci et al. (2509.16664), one matrix in float64


def both_defects(w):
    """W^H W - I and W W^H - I."""
    m, n = w.shape
    return adjoint(w) @ w - np.eye(n), w @ adjoint(w) - np.eye(m)


def defect(w):
    """Of the Gram matrix of the shorter side; of the columns where there is none."""
    return both_defects(w)[0 if w.shape[0] >= w.shape[1] else 1]


def frobenius(x):
    return np.sqrt((np.abs(x) ** 2).sum())


def exact_isometry(w):
    return np.abs(np.linalg.svd(w, compute_uv=False) ** 2 - 1).max()


def gated(x, radius, sharpness):
    return scipy.special.expit(sharpness * (x - radius)) * x


def slope_of_the_gate(x, radius, sharpness):
    gate = scipy.special.expit(sharpness * (x - radius))
    return gate + x * sharpness * gate * (1 - gate)


FORMULAS = {
    "soft": lambda w: (np.abs(defect(w)) ** 2).sum(),
    "double": lambda w: (
        sum(frobenius(d) ** 2 for d in both_defects(w)) - abs(w.shape[0] - w.shape[1])
    ),
    "coherence": lambda w: np.abs(defect(w)).max(),
    "isometry": exact_isometry,
    "lambda": lambda w: gated(frobenius(defect(w)), RADIUS, SHARPNESS),
}


def slices(w):
    return oracles.float64(w).reshape(-1, *w.shape[-2:])


def formula(name, w):
    return sum(FORMULAS[name](matrix) for matrix in slices(w))


# --- directions of steepest ascent, for one matrix with no more columns than rows


def ascent_of_soft(w):
    return 4 * w @ defect(w)


def ascent_of_coherence(w):
    d = defect(w)
    largest = np.isclose(np.abs(d), np.abs(d).max(), rtol=1e-12)
    share = np.where(largest, d / np.where(largest, np.abs(d), 1), 0) / largest.sum()
    return w @ (share + adjoint(share))


def ascent_of_isometry(w):
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    i = np.abs(s**2 - 1).argmax()
    return np.sign(s[i] ** 2 - 1) * 2 * s[i] * np.outer(u[:, i], vh[i])


def ascent_of_lambda(w):
    x = frobenius(defect(w))
    return slope_of_the_gate(x, RADIUS, SHARPNESS) * ascent_of_soft(w) / (2 * x)


ASCENTS = {
    "soft": ascent_of_soft,
    "double": lambda w: 2 * ascent_of_soft(w),
    "coherence": ascent_of_coherence,
    "isometry": ascent_of_isometry,
    "lambda": ascent_of_lambda,
}


def closed_form_gradient(name, w):
    """In JAX's convention, the conjugate of the direction of steepest ascent."""
    ascent, tall = ASCENTS[name], w.shape[-2] >= w.shape[-1]
    rows = [ascent(x) if tall else adjoint(ascent(adjoint(x))) for x in slices(w)]
    return np.reshape(rows, w.shape).conj()


# --- naive formulas in jnp, of one real matrix with no more columns than rows


def naive_defect(w):
    return w.T @ w - jnp.eye(w.shape[1])


def naive_lambda(w):
    x = jnp.sqrt((naive_defect(w) ** 2).sum())
    return jax.nn.sigmoid(SHARPNESS * (x - RADIUS)) * x


NAIVE = {
    "soft": lambda w: (naive_defect(w) ** 2).sum(),
    "double": lambda w: (
        (naive_defect(w) ** 2).sum()
        + ((w @ w.T - jnp.eye(w.shape[0])) ** 2).sum()
        - (w.shape[0] - w.shape[1])
    ),
    "coherence": lambda w: jnp.abs(naive_defect(w)).max(),
    "isometry": lambda w: jnp.linalg.norm(naive_defect(w), ord=2),
    "lambda": naive_lambda,
}


# --- values and gradients


@functools.cache
def measured(name):
    """Pairs of a matrix and the penalty's value and gradient there, all from one program."""
    function = jax.value_and_grad(PENALTIES[name])
    ws = [normal(shape) for shape in [(6, 4), (5, 5), (1, 5), (2, 2, 4, 6)]]
    ws += [normal(shape, np.complex64) for shape in [(3, 6, 4), (4, 6)]]
    return list(zip(ws, jax.jit(lambda ws: [function(w) for w in ws])(ws), strict=True))


@every_penalty
def test_the_value_is_the_formula_summed_over_the_matrices(name):
    for w, (value, _) in measured(name):
        case = f"{w.shape} {w.dtype}"
        assert value.shape == ()
        assert value.dtype == np.float32, case
        np.testing.assert_allclose(value, formula(name, w), rtol=2e-5, err_msg=case)


@every_penalty
def test_the_gradient_is_its_closed_form(name):
    for w, (_, gradient) in measured(name):
        expected = closed_form_gradient(name, w)
        assert gradient.dtype == w.dtype
        assert oracles.relative_error(gradient, expected) < 5e-5, f"{w.shape} {w.dtype}"


@every_penalty
def test_16_bits_are_computed_in_float32(name):
    """Entries of 40 have products with a sum beyond the largest float16."""
    dtypes = jnp.float16, jnp.bfloat16
    small = [jnp.asarray(normal(shape), d) for shape in [(60, 4), (4, 60)] for d in dtypes]
    large = [jnp.asarray(40 * normal((60, 4)), jnp.float16)]
    function = jax.value_and_grad(PENALTIES[name])
    both, values = jax.jit(
        lambda ws, large: ([function(w) for w in ws], [PENALTIES[name](w) for w in large])
    )(small, large)
    for w, value in zip(small + large, [value for value, _ in both] + values, strict=True):
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, formula(name, w), rtol=2e-5)
    for w, (_, gradient) in zip(small, both, strict=True):
        assert gradient.dtype == w.dtype
        expected = closed_form_gradient(name, w)
        assert oracles.relative_error(gradient, expected) < tolerances.eps(w.dtype)


@every_penalty
def test_in_double_precision_slopes_are_those_of_the_naive_formula_and_of_differences(name):
    w, directions, step = normal((6, 4), np.float64), normal((5, 6, 4), np.float64, seed=1), 1e-5

    def measure(w, directions):
        penalty = PENALTIES[name]
        ahead, behind = (
            jax.vmap(lambda v, sign=sign: penalty(w + sign * step * v))(directions)
            for sign in (1, -1)
        )
        forward = jax.vmap(lambda v: jax.jvp(penalty, (w,), (v,))[1])(directions)
        values = penalty(w), NAIVE[name](w)
        return values, jax.grad(penalty)(w), jax.grad(NAIVE[name])(w), forward, ahead - behind

    with tolerances.double_precision():
        values, gradient, naive, forward, differences = jax.jit(measure)(w, jnp.asarray(directions))
    assert values[0].dtype == gradient.dtype == np.float64
    np.testing.assert_allclose(*values, rtol=1e-12)
    np.testing.assert_allclose(values[0], formula(name, w), rtol=1e-12)
    np.testing.assert_allclose(gradient, naive, rtol=1e-9, atol=1e-10)
    assert oracles.relative_error(gradient, closed_form_gradient(name, w)) < 1e-12
    expected = (directions * np.asarray(gradient)).sum((1, 2))
    np.testing.assert_allclose(forward, expected, rtol=1e-10)
    np.testing.assert_allclose(np.asarray(differences) / (2 * step), expected, rtol=1e-6, atol=1e-6)


def test_a_hessian_vector_product_of_soft_orthogonality_is_right():
    w, v = normal((6, 4), np.float64), normal((6, 4), np.float64, seed=1)
    step = 1e-5
    with tolerances.double_precision():
        gradient = jax.jit(jax.grad(soft_orthogonality))
        forward = jax.jvp(gradient, (w,), (v,))[1]
        backward = jax.grad(lambda w: (gradient(w) * v).sum())(jnp.asarray(w))
        difference = (gradient(w + step * v) - gradient(w - step * v)) / (2 * step)
    expected = 4 * v @ defect(w) + 4 * w @ (v.T @ w + w.T @ v)
    np.testing.assert_allclose(forward, expected, rtol=1e-12)
    np.testing.assert_allclose(backward, expected, rtol=1e-12)
    np.testing.assert_allclose(difference, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["soft", "double", "coherence", "lambda"])
def test_second_derivatives_are_those_of_the_naive_formula(name):
    """Not of the isometry, whose vector counts as constant."""
    w, v = normal((6, 4), np.float64), normal((6, 4), np.float64, seed=1)

    def product(penalty, w, v):
        return jax.jvp(jax.grad(penalty), (w,), (v,))[1]

    with tolerances.double_precision():
        both = jax.jit(lambda w, v: [product(f[name], w, v) for f in (PENALTIES, NAIVE)])(w, v)
    np.testing.assert_allclose(*both, rtol=1e-9, atol=1e-10)


# --- zero at orthogonal matrices, and only there

ORTHOGONAL = {
    "identity": np.eye(5),
    "columns": np.eye(6, 4),
    "stack": np.stack([np.eye(4, 6), np.eye(4, 6)[:, ::-1]]),
    "signed permutation": np.eye(4)[[2, 0, 3, 1]] * np.array([1, -1, 1, -1]),
    "complex": 1j * np.eye(5),
}
UNGATED = PENALTIES | {"lambda": functools.partial(lambda_orthogonality, radius=0.0)}


@every_penalty
def test_value_and_gradient_are_exactly_zero_at_exactly_orthogonal_matrices(name):
    """Where the derivative of a norm is 0 / 0."""
    ws = [w.astype(np.complex64 if np.iscomplexobj(w) else np.float32) for w in ORTHOGONAL.values()]
    ws.append(jnp.eye(5, dtype=jnp.bfloat16))
    functions = [jax.value_and_grad(f) for f in {PENALTIES[name], UNGATED[name]}]
    results = jax.jit(lambda ws: [[f(w) for f in functions] for w in ws])(ws)
    for w, both in zip(ws, results, strict=True):
        for value, gradient in both:
            np.testing.assert_array_equal(value, 0.0, err_msg=str(w))
            np.testing.assert_array_equal(gradient, np.zeros_like(w), err_msg=str(w))


@every_penalty
def test_it_is_zero_for_orthogonal_matrices_and_positive_for_all_others(name):
    rng = np.random.default_rng(0)
    function = jax.jit(lambda ws: [jax.vmap(UNGATED[name])(w) for w in ws])
    steps = np.array([0, 1e-2, 1e-1, 1.0, 1e3])[:, None, None]
    stacks = []
    for shape in [(7, 4), (4, 7), (5, 5), (1, 6)]:
        dtype = np.complex64 if shape == (4, 7) else np.float32
        w = oracles.orthogonal(rng, *shape, dtype)
        stacks.append((w + steps * normal(shape, dtype)).astype(dtype))
    for w, values in zip(stacks, function(stacks), strict=True):
        assert values[0] < 1e-5
        assert (values >= 0).all()
        assert (values[1:] > 100 * values[0]).all(), w.shape


@every_penalty
def test_the_gradient_is_zero_at_zero_weights_and_where_there_are_none(name):
    function = jax.value_and_grad(PENALTIES[name])
    zeros = [jnp.zeros(shape) for shape in [(6, 4), (4, 6), (0, 4, 3), (4, 0), (2, 0, 3)]]
    for zero, (value, gradient) in zip(
        zeros, jax.jit(lambda ws: [function(w) for w in ws])(zeros), strict=True
    ):
        assert gradient.shape == zero.shape
        assert not np.asarray(gradient).any()
        assert value > 0.1 if zero.size else value == 0, zero.shape


@every_penalty
def test_a_nan_is_not_hidden(name):
    w = normal((6, 4))
    w[2, 3] = np.nan
    value, gradient = jax.jit(jax.value_and_grad(PENALTIES[name]))(w)
    assert np.isnan(value)
    assert np.isnan(gradient).any()


# --- invariance


SIDES = [(7, 4), (4, 7), (5, 5)]


@pytest.mark.parametrize("name", ["soft", "double", "isometry", "lambda"])
def test_orthogonal_maps_on_either_side_change_nothing(name):
    rng = np.random.default_rng(0)
    stacks = []
    for shape in SIDES:
        w = normal(shape, np.float64)
        q, p = oracles.orthogonal(rng, shape[0]), oracles.orthogonal(rng, shape[1])
        stacks.append(np.stack([w, q @ w, w @ p, q @ w @ p]))
    with tolerances.double_precision():
        values = jax.jit(lambda ws: [jax.vmap(PENALTIES[name])(w) for w in ws])(stacks)
    for value in values:
        np.testing.assert_allclose(value, value[0], rtol=1e-11)


def test_coherence_keeps_under_orthogonal_maps_of_the_long_side_and_signed_permutations():
    """Columns are compared where the matrix is square, so its long side are the rows."""
    rng = np.random.default_rng(0)
    stacks = []
    for shape in SIDES:
        tall = shape[0] >= shape[1]
        w = normal(shape, np.float64)
        long, short = shape if tall else shape[::-1]
        q, p = oracles.orthogonal(rng, long), oracles.orthogonal(rng, short)
        signed = np.eye(short)[rng.permutation(short)] * rng.choice([-1, 1], short)
        ws = [w, q @ w, w @ signed, w @ p] if tall else [w, w @ q, signed @ w, p @ w]
        stacks.append(np.stack(ws))
    with tolerances.double_precision():
        values = jax.jit(lambda ws: [jax.vmap(mutual_coherence)(w) for w in ws])(stacks)
    for value in map(np.asarray, values):
        np.testing.assert_allclose(value[:3], value[0], rtol=1e-12)
        assert abs(value[3] / value[0] - 1) > 0.01


@every_penalty
def test_a_matrix_and_its_transpose_and_conjugate_have_the_same(name):
    """Of a square one, the columns' coherence is not that of the rows."""
    w = normal((7, 4), np.complex64)
    variants = jax.jit(lambda w: [PENALTIES[name](x) for x in (w, w.T, w.conj(), 1j * w)])(w)
    np.testing.assert_allclose(variants, variants[0], rtol=1e-5)


# --- soft and double soft orthogonality


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5), (1, 6)], ids=str)
def test_without_its_floor_double_soft_orthogonality_is_twice_the_single_one(shape):
    w = normal(shape)
    both = sum(frobenius(d) ** 2 for d in both_defects(oracles.float64(w)))
    floor = abs(shape[0] - shape[1])
    np.testing.assert_allclose(double_soft_orthogonality(w), both - floor, rtol=1e-5)
    np.testing.assert_allclose(double_soft_orthogonality(w), 2 * soft_orthogonality(w), rtol=1e-6)
    q = oracles.orthogonal(np.random.default_rng(0), *shape)
    assert sum(frobenius(d) ** 2 for d in both_defects(q)) == pytest.approx(floor, abs=1e-12)


@pytest.mark.parametrize("name", ["soft", "double", "coherence", "lambda"])
def test_value_and_gradient_take_two_products_of_matrices(name):
    for shape in [(7, 5), (5, 7), (3, 7, 5)]:
        function = jax.value_and_grad(PENALTIES[name])
        products = list(oracles.matrix_products(jax.make_jaxpr(function)(jnp.ones(shape)).jaxpr))
        assert len(products) == 2, products


@pytest.mark.parametrize("shape", [(8, 5), (5, 8)], ids=str)
def test_the_gradient_flow_of_soft_orthogonality_moves_singular_values_to_one(shape):
    """s' = -4 s (s^2 - 1): 1 - 1 / s^2 falls as exp(-8 t), and singular vectors stay."""
    start = np.array([2.0, 1.5, 0.8, 0.3, 0.05])
    w = oracles.matrix_with_spectrum(np.random.default_rng(0), *shape, start)
    step, steps = 1e-3, 300

    def midpoint(w, _):
        half = w - step / 2 * jax.grad(soft_orthogonality)(w)
        return w - step * jax.grad(soft_orthogonality)(half), None

    with tolerances.double_precision():
        run = jax.jit(lambda w: jax.lax.scan(midpoint, w, length=steps)[0])
        soon, late = run(w), w
        for _ in range(8):
            late = run(late)
    square = 1 / (1 - (1 - 1 / start**2) * np.exp(-8 * step * steps))
    u, _, vh = np.linalg.svd(w, full_matrices=False)
    np.testing.assert_allclose(soon, (u * np.sqrt(square)) @ vh, atol=1e-4)
    assert np.abs(defect(np.asarray(late))).max() < 1e-5
    np.testing.assert_allclose(late, oracles.polar(w), atol=1e-5)


def test_fourth_powers_overflow_only_where_the_docstring_says():
    w = np.full((2, 2), 1e9, np.float32) * np.array([[1, -1], [1, 1]], np.float32)
    np.testing.assert_allclose(soft_orthogonality(w), formula("soft", w), rtol=1e-5)
    assert np.isinf(soft_orthogonality(w * 100))


# --- mutual coherence


def test_coherence_of_unit_columns_is_the_largest_cosine():
    w = normal((9, 5))
    w /= np.linalg.norm(w, axis=0)
    cosines = np.abs(w.T @ w - np.diag(np.diag(w.T @ w)))
    np.testing.assert_allclose(mutual_coherence(w), cosines.max(), rtol=1e-5)


def test_coherence_compares_columns_of_square_and_tall_matrices_and_rows_of_wide_ones():
    square = np.float32([[0, 0], [2, 2]])  # products of columns: 4, 4, 4; of rows: 0, 0, 8
    tall = np.float32([[0, 0], [2, 2], [0, 0]])
    values = jax.jit(lambda ws: [mutual_coherence(w) for w in ws])([square, square.T, tall, tall.T])
    np.testing.assert_array_equal(values, [4, 7, 4, 4])


def test_entries_that_attain_the_largest_share_the_slope_equally():
    """Two squares of length 4; and one of 2 and one of 0, both at distance 1."""
    equal = np.diag(np.float32([2, 2, 1]))
    opposite = np.float32([[1, 0, 0], [1, 0, 0], [0, 0, 1]])
    gradients = jax.jit(jax.vmap(jax.grad(mutual_coherence)))(np.stack([equal, opposite]))
    np.testing.assert_allclose(gradients[0], np.diag([2, 2, 0]))
    np.testing.assert_allclose(gradients[1], [[1, 0, 0], [1, 0, 0], [0, 0, 0]])


# --- spectral restricted isometry


@pytest.mark.parametrize(("shape", "dtype"), [((30, 20), np.float32), ((20, 30), np.complex64)])
def test_the_estimate_never_exceeds_the_norm_and_grows_with_the_steps(shape, dtype):
    scales = np.repeat([0.05, 0.15, 1.0], 20)[:, None, None]
    w = (scales * normal((60, *shape), dtype)).astype(dtype)
    exact = np.array([exact_isometry(matrix) for matrix in slices(w)])

    def estimates(w):
        steps = (1, 2, 10, 50)
        return [spectral_restricted_isometry(w, steps=n) for n in steps]

    values = np.array(jax.jit(jax.vmap(estimates))(w))
    assert (values <= exact * (1 + 1e-5)).all()
    assert (np.diff(values, axis=0) >= -1e-5 * exact).all()
    assert (values[-1] > 0.9 * exact).all()
    assert (values[0] < 0.9 * exact).any()


def test_ten_steps_reach_what_the_docstring_says_on_gaussian_matrices():
    for shape in [(256, 256), (256, 384)]:
        w = normal(shape) / np.float32(256**0.5)
        assert 0.84 < jax.jit(spectral_restricted_isometry)(w) / exact_isometry(w) < 1.0


def test_the_default_takes_ten_steps_and_does_not_square():
    estimate = spectral_restricted_isometry
    w = normal((30, 20))
    default, ten, nine, squared = jax.jit(
        lambda w: (
            estimate(w),
            estimate(w, steps=10, squared=False),
            estimate(w, steps=9),
            estimate(w, squared=True),
        )
    )(w)
    np.testing.assert_allclose(default, ten, rtol=1e-6)
    np.testing.assert_allclose(squared, default**2, rtol=1e-5)
    assert default > nine * (1 + 1e-4)


def test_squared_it_has_the_slope_of_a_square():
    def isometry(w, squared):
        return jax.vmap(functools.partial(spectral_restricted_isometry, squared=squared))(w)

    def both(w):
        sums = [lambda w, s=s: isometry(w, s).sum() for s in (False, True)]
        return isometry(w, False), [jax.grad(f)(w) for f in sums]

    w = normal((2, 6, 4))
    alone, (plain, squared) = jax.jit(both)(w)
    expected = 2 * np.asarray(alone)[:, None, None] * np.asarray(plain)
    np.testing.assert_allclose(squared, expected, rtol=1e-5, atol=1e-5)
    value = jax.jit(functools.partial(spectral_restricted_isometry, squared=True))(w)
    np.testing.assert_allclose(value, (np.asarray(alone) ** 2).sum(), rtol=1e-5)


def test_it_sees_singular_values_far_below_one_as_well_as_above():
    rng = np.random.default_rng(0)
    spectra = [(1.0, 1.0, 0.1), (1.2, 1.0, 0.9), (1.0, 0.0, 1.3)]
    stacks = [
        np.stack([oracles.matrix_with_spectrum(rng, *shape, s, np.float32) for s in spectra])
        for shape in [(6, 3), (3, 6)]
    ]
    for values in jax.jit(lambda ws: [jax.vmap(PENALTIES["isometry"])(w) for w in ws])(stacks):
        np.testing.assert_allclose(values, [0.99, 0.44, 1.0], rtol=1e-5)


@pytest.mark.parametrize("function", [spectral_restricted_isometry, "warm"])
def test_the_gram_matrix_is_never_formed(function):
    """Only products with vectors, three more backwards than forwards whatever the steps."""
    w = jnp.ones((7, 5))
    for steps in (1, 6):
        if function == "warm":
            _, apply = warm_spectral_restricted_isometry(steps=steps)
            programs = [apply, jax.value_and_grad(apply, has_aux=True)]
            arguments = w, jnp.ones(5)
        else:
            penalty = functools.partial(function, steps=steps)
            programs, arguments = [penalty, jax.value_and_grad(penalty)], (w,)
        forwards, both = (
            list(oracles.matrix_products(jax.make_jaxpr(program)(*arguments).jaxpr))
            for program in programs
        )
        for factors in both:
            assert any(1 in shape for shape in factors) or any(len(s) == 1 for s in factors)
        assert len(both) == len(forwards) + 3


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)], ids=str)
def test_the_gradient_takes_the_vector_of_the_power_iteration_for_constant(shape, dtype, squared):
    """With v after all steps but the last, |D v| and its slope W (r v^H + v r^H), r = D v / |D v|.

    Far from convergence, where slopes through the iteration would show.
    """
    w = normal(shape, dtype, seed=3) / 2
    steps = 2
    with tolerances.double_precision():
        init, apply = warm_spectral_restricted_isometry(steps=steps, squared=squared)
        start = jax.jit(init)(w)
        (value, last), gradient = jax.jit(jax.value_and_grad(apply, has_aux=True))(w, start)
    tall = w if shape[0] > shape[1] else adjoint(w)
    d, v = defect(tall), np.asarray(start)
    for _ in range(steps - 1):
        v = d @ v / np.linalg.norm(d @ v)
    norm = np.linalg.norm(d @ v)
    r = d @ v / norm
    assert abs(norm / exact_isometry(tall) - 1) > 1e-3
    ascent = tall @ (np.outer(r, v.conj()) + np.outer(v, r.conj()))
    if squared:
        norm, ascent = norm**2, 2 * norm * ascent
    np.testing.assert_allclose(value, norm, rtol=1e-12)
    np.testing.assert_allclose(np.abs(last), np.abs(r), atol=1e-12)  # of W^T conj(W) or W^H W
    expected = (ascent if shape[0] > shape[1] else adjoint(ascent)).conj()
    assert oracles.relative_error(gradient, expected) < 1e-12


# --- with memory


@pytest.mark.parametrize("squared", [False, True])
def test_the_first_call_is_that_without_memory(squared):
    init, apply = warm_spectral_restricted_isometry(steps=4, squared=squared)
    cold = functools.partial(spectral_restricted_isometry, steps=4, squared=squared)
    function = jax.jit(lambda ws: [(apply(w, init(w))[0], cold(w)) for w in ws])
    for pair in function([normal((30, 20)), normal((2, 20, 30))]):
        np.testing.assert_allclose(*pair, rtol=1e-5)


def test_calls_with_memory_go_on_where_the_last_one_stopped():
    w = normal((2, 30, 20))
    init, apply = warm_spectral_restricted_isometry(steps=2)

    def calls(w):
        memory = init(w)
        for count in range(1, 4):
            value, memory = apply(w, memory)
            yield value, spectral_restricted_isometry(w, steps=2 * count)

    for pair in jax.jit(lambda w: list(calls(w)))(w):
        np.testing.assert_allclose(*pair, rtol=1e-5)


def test_a_single_step_follows_a_changing_matrix_with_memory_and_not_without():
    """Singular vectors turn by up to half a per cent at each call, singular values swell."""
    rng = np.random.default_rng(0)
    turn = rng.standard_normal((24, 24))
    turn = scipy.linalg.expm(5e-3 * (turn - turn.T) / np.linalg.norm(turn - turn.T, 2))
    w = oracles.matrix_with_spectrum(rng, 32, 24, np.linspace(1.5, 0.7, 24))
    ws = []
    for t in range(200):
        w = w @ turn
        ws.append((1 + 0.1 * np.sin(t / 30)) * w)
    init, apply = warm_spectral_restricted_isometry()

    def call(memory, w):
        value, memory = apply(w, memory)
        return memory, (value, spectral_restricted_isometry(w, steps=1))

    run = jax.jit(lambda ws: jax.lax.scan(call, init(ws[0]), ws)[1])
    warm, cold = run(np.float32(ws)) / np.array([exact_isometry(w) for w in ws])
    first, last = (np.linalg.svd(w)[2][0] for w in (ws[0], ws[-1]))
    assert abs(first @ last) < 0.9
    assert (warm <= 1 + 1e-5).all()
    assert (warm[50:] > 0.99).all()
    assert (cold[50:] < 0.8).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_memory_is_a_unit_vector_per_matrix_in_float32(dtype):
    init, apply = warm_spectral_restricted_isometry()
    ws = [jnp.asarray(normal(shape), dtype) for shape in [(6, 4), (2, 3, 4, 6)]]
    results = jax.jit(lambda ws: [(init(w), *apply(w, init(w))) for w in ws])(ws)
    for w, (first, value, second) in zip(ws, results, strict=True):
        shape = jax.eval_shape(init, jax.ShapeDtypeStruct(w.shape, w.dtype))
        assert value.dtype == np.float32
        for memory in (first, second):
            assert memory.shape == shape.shape == (*w.shape[:-2], min(w.shape[-2:]))
            assert memory.dtype == shape.dtype
            assert memory.dtype == (np.complex64 if dtype == "complex64" else np.float32)
            np.testing.assert_allclose(np.linalg.norm(memory, axis=-1), 1.0, rtol=1e-6)


def test_the_first_vector_follows_from_the_shape_alone():
    init, _ = warm_spectral_restricted_isometry()
    first = init(jax.ShapeDtypeStruct((6, 4), np.float32))
    np.testing.assert_array_equal(first, init(normal((6, 4))))
    assert len(np.unique(np.abs(first))) > 1


def test_memory_is_float64_for_double_precision():
    with tolerances.double_precision():
        init, apply = warm_spectral_restricted_isometry()
        first = init(jnp.ones((6, 4)))
        second = apply(jnp.ones((6, 4)), first)[1]
    assert first.dtype == second.dtype == np.float64


def test_memory_keeps_a_vector_at_an_orthogonal_matrix():
    """It has no direction there, and must not be lost for later."""
    init, apply = warm_spectral_restricted_isometry()
    apply = jax.jit(apply)
    memory = init(jnp.eye(6, 4))
    for _ in range(3):
        value, memory = apply(jnp.eye(6, 4), memory)
        assert value == 0
    np.testing.assert_allclose(np.linalg.norm(memory), 1.0, rtol=1e-6)
    rng = np.random.default_rng(0)
    w = oracles.matrix_with_spectrum(rng, 6, 4, [2, 1, 1, 1], np.float32)
    for _ in range(20):
        value, memory = apply(w, memory)
    np.testing.assert_allclose(value, 3.0, rtol=1e-5)


def test_matrices_of_a_stack_have_memories_that_do_not_mix():
    w = normal((3, 12, 8)) * np.array([0.1, 1.0, 30.0], np.float32)[:, None, None]
    init, apply = warm_spectral_restricted_isometry()
    memory = jax.jit(init)(w)
    value, after = jax.jit(apply)(w, memory)
    values, alone = jax.jit(jax.vmap(apply))(w, memory)
    np.testing.assert_allclose(value, values.sum(), rtol=1e-5)
    np.testing.assert_allclose(after, alone, atol=1e-5)


def test_it_is_a_pair_of_init_and_apply():
    penalty = warm_spectral_restricted_isometry()
    assert isinstance(penalty, WithMemory)
    assert penalty == (penalty.init, penalty.apply)


# --- λ-orthogonality


def test_the_gate_is_the_sigmoid_of_sharpness_times_the_distance_from_the_radius():
    w = normal((6, 4))
    x = frobenius(defect(oracles.float64(w)))
    function = jax.jit(lambda_orthogonality)
    for radius in (0.0, 0.5 * x, x, 2 * x):
        for sharpness in (0.0, 0.1, 1.0, 10.0, 1e3):
            value = function(w, radius, sharpness)
            np.testing.assert_allclose(value, gated(x, radius, sharpness), rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(function(w, x), gated(x, x, 10.0), rtol=1e-4)


def test_its_default_sharpness_is_ten():
    w = normal((6, 4)) / 3
    x = frobenius(defect(oracles.float64(w)))
    for radius in (x - 0.1, x + 0.1):
        np.testing.assert_allclose(lambda_orthogonality(w, radius), gated(x, radius, 10), rtol=1e-5)


def test_a_radius_of_zero_gives_the_distance_and_an_infinite_one_nothing():
    w = normal((6, 4))
    x = frobenius(defect(oracles.float64(w)))
    function = jax.jit(jax.value_and_grad(lambda_orthogonality))
    for sharpness in (1.0, 10.0):
        value, gradient = function(w, jnp.inf, sharpness)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0.0)
    np.testing.assert_allclose(function(w, 0.0, 10.0)[0], x, rtol=1e-6)


def test_an_infinite_radius_frees_the_matrix_at_any_sharpness_and_scale():
    function = jax.jit(jax.value_and_grad(lambda_orthogonality))
    for sharpness in (0.0, 1e-30, 10.0, 1e30):
        for scale in (1.0, 1e10, 1e18):
            w = normal((6, 4)) * np.float32(scale)
            value, gradient = function(w, jnp.inf, sharpness)
            assert value == 0, (sharpness, scale)
            np.testing.assert_array_equal(gradient, 0.0)


def test_without_sharpness_it_is_half_the_distance():
    w = normal((6, 4))
    x = frobenius(defect(oracles.float64(w)))
    np.testing.assert_allclose(lambda_orthogonality(w, 2.0, 0.0), x / 2, rtol=1e-6)


def test_every_matrix_of_a_stack_has_its_own_gate():
    w = normal((3, 6, 4)) * np.array([0.3, 1.0, 3.0], np.float32)[:, None, None]
    expected = sum(gated(frobenius(defect(x)), 5.0, 10.0) for x in slices(w))
    np.testing.assert_allclose(lambda_orthogonality(w, 5.0), expected, rtol=1e-5)


def test_radius_and_sharpness_may_be_traced():
    w = normal((6, 4)) / 2
    x = frobenius(defect(oracles.float64(w)))
    traces = []

    @jax.jit
    def function(w, radius, sharpness):
        traces.append(None)
        slopes = jax.value_and_grad(lambda_orthogonality, argnums=(1, 2))
        return slopes(w, radius, sharpness)

    for radius, sharpness in [(1.0, 2.0), (float(x), 1.0), (4.0, 0.5)]:
        value, (by_radius, by_sharpness) = function(w, radius, sharpness)
        gate = scipy.special.expit(sharpness * (x - radius))
        np.testing.assert_allclose(value, gate * x, rtol=1e-5)
        expected = -sharpness * gate * (1 - gate) * x
        np.testing.assert_allclose(by_radius, expected, rtol=1e-4)
        expected = (x - radius) * gate * (1 - gate) * x
        np.testing.assert_allclose(by_sharpness, expected, rtol=1e-4, atol=1e-5)
    assert len(traces) == 1
    several = jax.jit(jax.vmap(lambda radius: lambda_orthogonality(w, radius)))
    many = several(np.float32([0.0, 1.0, np.inf]))
    np.testing.assert_allclose(many, gated(x, np.array([0.0, 1.0, 1e30]), 10.0), rtol=1e-5)


@pytest.mark.parametrize(("radius", "sharpness"), [(2.0, 10.0), (12.0, 10.0), (2.0, 100.0)])
def test_the_force_is_strongest_at_the_radius_and_one_outside(radius, sharpness):
    """αλ/4 + 1/2 (2509.16664, equation 6). Along sqrt(1 + t) I of order 4 the distance is 2 t."""
    x = np.linspace(0.01, 2 * radius, 4001)

    def along(x):
        return lambda_orthogonality(jnp.sqrt(1 + x / 2) * jnp.eye(4), radius, sharpness)

    with tolerances.double_precision():
        slopes = np.asarray(jax.jit(jax.vmap(jax.grad(along)))(np.append(x, radius)))
    slope, at_radius = slopes[:-1], slopes[-1]
    np.testing.assert_allclose(slope, slope_of_the_gate(x, radius, sharpness), rtol=1e-9)
    expected = sharpness * radius / 4 + 0.5
    np.testing.assert_allclose(at_radius, expected, rtol=1e-9)
    np.testing.assert_allclose(slope.max(), expected, rtol=0.02)
    assert abs(x[slope.argmax()] - radius) < 0.1 * radius
    np.testing.assert_allclose(slope[-1], 1.0, atol=1e-3)
    assert slope[0] < 0.01


def fitted_gap(penalty, *, weight=1.0, size=32, gap=15.2):
    """Gap |W^T W - I|_F where a least-squares fit and the penalty balance.

    The data come from a matrix A of the given gap; of many of them the mean squared error is
    |W - A|_F^2 / n.
    """
    rng = np.random.default_rng(0)
    target = rng.standard_normal((size, size)) / size**0.5
    target *= scipy.optimize.brentq(lambda c: frobenius(defect(c * target)) - gap, 1.0, 5.0)

    @jax.value_and_grad
    def loss(w):
        w = w.reshape(size, size)
        return jnp.sum((w - target) ** 2) / size + weight * penalty(w)

    with tolerances.double_precision():
        start = rng.uniform(-1, 1, (size, size)).ravel() / size**0.5
        fit = scipy.optimize.minimize(
            jax.jit(loss), start, jac=True, method="L-BFGS-B", options={"maxiter": 2000}
        )
    return frobenius(defect(fit.x.reshape(size, size)))


def test_a_fit_ends_at_the_radius_the_closer_the_sharper():
    """An independent fit ended at 0.41, 1.55 and 1.93."""
    blunt, middle, sharp = (
        fitted_gap(functools.partial(lambda_orthogonality, radius=2.0, sharpness=sharpness))
        for sharpness in (1.0, 10.0, 100.0)
    )
    assert 1.4 < middle < 2.1
    assert 1.4 < sharp < 2.1
    assert blunt < middle < sharp < 2.0
    assert 0.05 < blunt < 0.8
    wider = fitted_gap(functools.partial(lambda_orthogonality, radius=5.0))
    assert 4.3 < wider < 5.1


def test_a_weak_penalty_holds_until_the_pull_of_the_data_exceeds_its_strongest_force():
    """An independent fit ended at 1.78 with weight 0.1 and at 11.4 with 0.01."""
    penalty = functools.partial(lambda_orthogonality, radius=2.0)
    assert 1.6 < fitted_gap(penalty, weight=0.1) < 2.0
    assert fitted_gap(penalty, weight=0.01) > 10


# --- scales


@pytest.mark.parametrize("name", ["coherence", "isometry", "lambda"])
def test_penalties_that_are_not_squared_bear_large_weights(name):
    ws = [normal(shape) * np.float32(s) for shape in [(6, 4), (4, 6)] for s in (1e6, 1e10, 1e18)]
    function = jax.value_and_grad(PENALTIES[name])
    both = jax.jit(lambda ws: [function(w) for w in ws])(ws)
    for w, (value, gradient) in zip(ws, both, strict=True):
        np.testing.assert_allclose(value, formula(name, w), rtol=1e-4)
        assert np.isfinite(gradient).all()
        assert oracles.relative_error(gradient, closed_form_gradient(name, w)) < 1e-4


@every_penalty
def test_tiny_weights_are_as_far_from_orthogonal_as_zero(name):
    """And are pushed away from it, except those orthogonal to the vector of the isometry."""
    ws = normal((6, 4)) * np.float32([1e-10, 1e-20, 1e-30])[:, None, None]
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(PENALTIES[name])))(ws)
    np.testing.assert_allclose(values, formula(name, np.zeros((6, 4))), rtol=1e-6)
    slopes = (oracles.float64(gradients) * normal((6, 4))).sum((1, 2))
    assert (slopes < 0).all()
    np.testing.assert_allclose(slopes / slopes[0], [1, 1e-10, 1e-20], rtol=1e-4)

"""Float64 NumPy transcriptions of the papers, written without looking at the library.

Everything here is in Flax orientation, `x @ w`: a kernel is (fan_in, fan_out) and a neuron is a
column. The papers and their PyTorch codes write the transpose.
"""

import numpy as np
import scipy.fft
import scipy.linalg
import scipy.optimize

MUON_TRIPLE = (3.4445, -4.7750, 2.0315)
MUON_TABLE = (MUON_TRIPLE,) * 5


def mT(x):
    """Swap the last two axes."""
    return np.swapaxes(x, -1, -2)


def float64(x):
    """Widen to float64 or complex128, whatever the array library or dtype."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64)


def relative_error(actual, expected):
    """Largest difference of entries over the largest expected entry."""
    actual, expected = float64(actual), float64(expected)
    assert actual.shape == expected.shape
    scale = np.abs(expected).max()
    return np.abs(actual - expected).max() / (scale if scale else 1.0)


# --- matrices with known singular values


def orthogonal(rng, m, n=None, dtype=np.float64):
    """Matrix with orthonormal columns, or rows where it is wide."""
    n = m if n is None else n
    x = rng.standard_normal((max(m, n), min(m, n)))
    if np.issubdtype(dtype, np.complexfloating):
        x = x + 1j * rng.standard_normal(x.shape)
    q = np.linalg.qr(x)[0]
    return q if m >= n else q.conj().T


def matrix_with_spectrum(rng, m, n, singular_values, dtype=np.float64):
    """Random singular vectors, prescribed singular values (min(m, n) of them)."""
    r = min(m, n)
    left, right = orthogonal(rng, m, r, dtype), orthogonal(rng, r, n, dtype)
    return ((left * np.asarray(singular_values, np.float64)) @ right).astype(dtype)


def on_singular_values(x, function):
    """U function(s) V^H: the definition of an odd matrix function."""
    u, s, vh = np.linalg.svd(float64(x), full_matrices=False)
    return (u * function(s)[..., None, :]) @ vh


def polar(x):
    """U V^H of the thin SVD: the nearest matrix with orthonormal rows or columns."""
    return on_singular_values(x, np.ones_like)


# --- Newton-Schulz: Jordan et al. 2024, the block `zeropower_via_newtonschulz5`


def scalar_map(table, s):
    """Composition of s -> a s + b s^3 + c s^5."""
    s = np.asarray(s, np.float64)
    for a, b, c in table:
        s = a * s + b * s**3 + c * s**5
    return s


def scalar_slope(table, s):
    """Derivative of `scalar_map`, by the chain rule."""
    s, slope = np.asarray(s, np.float64), 1.0
    for a, b, c in table:
        s, slope = a * s + b * s**3 + c * s**5, slope * (a + 3 * b * s**2 + 5 * c * s**4)
    return slope


def gain(table, smallest):
    """Largest factor by which the map enlarges a perturbation of a matrix of unit Frobenius norm.

    Divided differences of an odd function bound it (Daleckii and Krein): its slope between singular
    values and its value over s across the two blocks of the Jordan-Wielandt matrix.
    """
    s = np.geomspace(smallest, 1.0, 2000)
    return max(np.abs(scalar_slope(table, s)).max(), np.abs(scalar_map(table, s) / s).max())


def newton_schulz(x, table=MUON_TABLE):
    """The iteration on the matrix itself, wide side out: A = X X^H, X <- a X + (b A + c A^2) X."""
    x = float64(x)
    if x.shape[-2] > x.shape[-1]:
        return mT(newton_schulz(mT(x), table))
    norm = np.sqrt((np.abs(x) ** 2).sum((-2, -1), keepdims=True))
    x = x / np.where(norm == 0, 1.0, norm)
    for a, b, c in table:
        gram = x @ mT(x).conj()
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


# --- Optimal odd quintics: Amsel et al., 2505.16932, Algorithm 1, without its Remez iteration


def quintic_by_linear_programming(lower, upper, points=1500):
    """Minimise E subject to |1 - p(x)| <= E on a grid of [lower, upper]: (a, b, c, E).

    The grid is finer towards both ends, where the extrema crowd.
    """
    angle = np.linspace(0, np.pi, points)
    x = np.union1d(
        lower + (upper - lower) * (1 - np.cos(angle)) / 2, np.geomspace(lower, upper, points)
    )
    odd = np.stack([x, x**3, x**5], axis=1)
    slack = np.ones((len(x), 1))
    constraints = np.block([[odd, -slack], [-odd, -slack]])
    bounds = np.concatenate([np.ones(len(x)), -np.ones(len(x))])
    result = scipy.optimize.linprog(
        [0, 0, 0, 1], constraints, bounds, bounds=[(None, None)] * 3 + [(0, None)]
    )
    assert result.success, result.message
    return result.x


def equioscillating_quintic(lower, upper):
    """Solve p(l) = p(r) = 1 - E, p(q) = p(u) = 1 + E, p'(q) = p'(r) = 0, from the linear program.

    Near lower = upper, where that is at its own tolerance, from the Taylor polynomial of the sign.
    """
    if lower / upper < 0.9:
        a, b, c, error = quintic_by_linear_programming(lower, upper)
        root = np.sqrt(9 * b**2 - 20 * a * c)
        q, r = np.sqrt((-3 * b + np.array([-1, 1]) * root) / (10 * c))
    else:
        a, b, c = np.array([15, -10, 3]) / 8 / upper ** np.array([1, 3, 5])
        q, r, error = (3 * lower + upper) / 4, (lower + 3 * upper) / 4, 0.0

    def residual(z):
        a, b, c, error, q, r = z
        x = np.array([lower, q, r, upper])
        value = a * x + b * x**3 + c * x**5
        slope = a + 3 * b * x**2 + 5 * c * x**4
        return [*(value - 1 + error * np.array([1, -1, 1, -1])), slope[1], slope[2]]

    solution = scipy.optimize.root(residual, [a, b, c, error, q, r], tol=1e-15).x
    assert np.abs(residual(solution)).max() < 1e-12
    return solution[:3], solution[3]


def composed_quintics(steps, lower, *, cushion=0.0, safety=1.0, tracked=False):
    """Greedy composition: each step is optimal for the interval that the steps before it leave.

    `tracked` says whether the interval follows the polynomials with the safety factor in them
    (modded-nanogpt's table) or without it (the paper's). The last step has no safety factor.
    """
    upper, table = 1.0, []
    powers = np.array([1, 3, 5])
    for step in range(steps):
        start = max(lower, cushion * upper)
        if start / upper > 1 - 1e-3:
            row = np.array([15, -10, 3]) / 8 / upper**powers
        else:
            row = np.asarray(equioscillating_quintic(start, upper)[0])
        if start > lower:
            row = row * 2 / (scalar_map([row], lower) + scalar_map([row], upper))
        safe = row / safety**powers if step < steps - 1 else row
        lower = float(scalar_map([safe if tracked else row], lower))
        upper = 2 - lower
        table.append(tuple(safe))
    return tuple(table)


# --- Zolotarev's rational functions: Nakatsukasa and Freund, 2016, section 3


def zolotarev_points(degree, lower):
    """c_i = l^2 sn^2 / cn^2 at i K' / (2 degree + 1), modulus sqrt(1 - l^2), for i to 2 degree.

    From the amplitude by arithmetic and geometric means (Abramowitz and Stegun, 16.4); the second
    half by c_i c_(2 degree + 1 - i) = l^2.
    """
    a, b, c, means = 1.0, lower, np.sqrt(1 - lower**2), []
    for _ in range(10):
        a, b, c = (a + b) / 2, np.sqrt(a * b), (a - b) / 2
        means.append((a, c))
    angle = 2.0 ** len(means) * np.arange(1, degree + 1) * np.pi / (4 * degree + 2)
    for a, c in reversed(means):
        angle = (angle + np.arcsin(c / a * np.sin(angle))) / 2
    first = np.square(lower * np.tan(angle))
    return np.concatenate([first, lower**2 / first[::-1]])


def zolotarev_function(degree, lower):
    """Best approximation of 1 on [lower, 1] by s prod (s^2 + zero) / (s^2 + pole), and its error.

    The error has opposite signs at the two ends, where it is largest: that fixes the factor.
    """
    points = zolotarev_points(degree, lower)

    def unscaled(s):
        square = np.square(np.asarray(s, np.float64))[..., None]
        return s * np.prod((square + points[1::2]) / (square + points[0::2]), axis=-1)

    least, most = unscaled(lower), unscaled(1.0)
    return lambda s: unscaled(s) * 2 / (least + most), (most - least) / (most + least)


def zolotarev_map(s, degree, lower, first=None):
    """What the method makes of singular values relative to the norm; `first`: of two passes."""
    if first is not None:
        lift, error = zolotarev_function(1, first)
        s = lift(s) / (1 + error)
    return zolotarev_function(degree, lower)[0](s)


def zolotarev_gain(degree, lower, smallest):
    """Bound of the factor by which the method enlarges an error in the Gram matrix.

    Of each fraction M a / (R + t), times the matrix: its derivative is -M a / (R + t)^2. `smallest`
    is the least singular value.
    """
    function, _ = zolotarev_function(degree, lower)
    points = zolotarev_points(degree, lower)
    poles, zeros = points[0::2], points[1::2]
    s = np.geomspace(smallest, 1.0, 2000)
    factor = function(1.0) * np.prod((1 + poles) / (1 + zeros))
    gain = (function(s) / s).max()
    for j, pole in enumerate(poles):
        residue = factor * np.prod(zeros - pole) / np.prod(np.delete(poles, j) - pole)
        gain += abs(residue) / (pole + smallest**2) * (s / (pole + s**2)).max()
    return gain


def smallest_lower(degree, rows, eps):
    """Where the first pole is twice the rounding error sqrt(rows) eps of the Gram matrix."""

    def excess(logarithm):
        return np.log(zolotarev_points(degree, np.exp(logarithm))[0] / (2 * rows**0.5 * eps))

    least, most = np.log(1e-6), np.log(0.5)
    if excess(least) >= 0:
        return 1e-6
    return np.exp(scipy.optimize.root_scalar(excess, bracket=(least, most)).root)


def schatten4(s):
    """Schatten-4 norm of a matrix of singular values s, and 1 where it is zero."""
    norm = (np.asarray(s, np.float64) ** 4).sum(-1, keepdims=True) ** 0.25
    return np.where(norm == 0, 1.0, norm)


def zolotarev(x, degree, lower, first=None):
    """The method, by SVD."""
    return on_singular_values(x, lambda s: zolotarev_map(s / schatten4(s), degree, lower, first))


# --- Shape factors of Muon (Jordan 2024, Moonlight 2502.16982), for a kernel (fan_in, fan_out)


def width_factor(fan_in, fan_out):
    """Keller Jordan's max(1, rows / cols)^0.5, rows = out."""
    return max(1.0, fan_out / fan_in) ** 0.5


def unit_rms_factor(fan_in, fan_out):
    """Bernstein: maps unit RMS vectors to unit RMS vectors."""
    return (fan_out / fan_in) ** 0.5


def adam_rms_factor(fan_in, fan_out, rms=0.2):
    """Moonlight, Lemma 1: an orthogonal matrix has RMS 1 / sqrt(max(fan_in, fan_out))."""
    return rms * max(fan_in, fan_out) ** 0.5


# --- Optimizers on one matrix: parameters after each gradient


def muon(
    p,
    gradients,
    learning_rate,
    *,
    momentum=0.95,
    nesterov=True,
    weight_decay=0.0,
    table=MUON_TABLE,
    factor=width_factor,
    orthogonalize=None,
):
    """KellerJordan/Muon, `muon_update` and `Muon.step`: EMA, Nesterov by lerp, decoupled decay."""
    p, m, path = float64(p), 0.0, []
    for g in map(float64, gradients):
        m = momentum * m + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * m if nesterov else m
        o = newton_schulz(u, table) if orthogonalize is None else orthogonalize(u)
        p = p * (1 - learning_rate * weight_decay) - learning_rate * factor(*p.shape[-2:]) * o
        path.append(p)
    return path


def normalize_neurons(o, v, decay=0.95, eps=1e-10, axis=-2):
    """NorMuon (2510.05491), Algorithm 1: one second moment per neuron, Frobenius norm restored."""
    o = float64(o)
    v = decay * v + (1 - decay) * (o**2).mean(axis, keepdims=True)
    scaled = o / (np.sqrt(v) + eps)
    norm = np.sqrt((o**2).sum((-2, -1), keepdims=True))
    return scaled * norm / (np.sqrt((scaled**2).sum((-2, -1), keepdims=True)) + eps), v


def normuon(
    p,
    gradients,
    learning_rate,
    *,
    momentum=0.95,
    decay=0.95,
    nesterov=True,
    weight_decay=0.0,
    table=MUON_TABLE,
    factor=width_factor,
):
    """zichongli5/NorMuon, `normuon_update`: Muon's direction, then `normalize_neurons`."""
    p, m, v, path = float64(p), 0.0, 0.0, []
    for g in map(float64, gradients):
        m = momentum * m + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * m if nesterov else m
        o, v = normalize_neurons(newton_schulz(u, table), v, decay)
        p = p * (1 - learning_rate * weight_decay) - learning_rate * factor(*p.shape[-2:]) * o
        path.append(p)
    return path


def clip_by_quantile(x, quantile):
    """ROOT (2511.20626), u - soft(u, t) with t the quantile of |u|; the code adds 1e-9 to it."""
    x = float64(x)
    threshold = np.quantile(np.abs(x), quantile, axis=(-2, -1), keepdims=True)
    return np.sign(x) * np.minimum(np.abs(x), threshold)


def root(
    p,
    gradients,
    learning_rate,
    *,
    momentum=0.95,
    quantile=0.9,
    nesterov=True,
    weight_decay=0.0,
    table=MUON_TABLE,
    factor=adam_rms_factor,
):
    """huawei-noah/ROOT: summed momentum, clipped, then Muon's direction at Adam's RMS."""
    p, m, path = float64(p), 0.0, []
    for g in map(float64, gradients):
        m = momentum * m + g
        u = g + momentum * m if nesterov else m
        o = newton_schulz(clip_by_quantile(u, quantile), table)
        p = p * (1 - learning_rate * weight_decay) - learning_rate * factor(*p.shape[-2:]) * o
        path.append(p)
    return path


def log_cosh_rms(z):
    """Logarithm of sqrt(mean cosh(z)^2) over each matrix, for any finite z."""
    z = np.abs(z)
    log_squares = 2 * (np.logaddexp(z, -z) - np.log(2))
    largest = log_squares.max((-2, -1), keepdims=True)
    return (largest + np.log(np.exp(log_squares - largest).mean((-2, -1), keepdims=True))) / 2


def cosh_direction(u, gamma, mode):
    """AuON (2509.24320): the paper's, the repository's, and with entries in units of their RMS."""
    u = float64(u)
    norm = np.sqrt((np.abs(u) ** 2).sum((-2, -1), keepdims=True))
    if mode == "rms":
        unit, units = u / norm, (u.shape[-2] * u.shape[-1]) ** 0.5
    else:
        unit, units = u / (norm + 1e-7), 1.0
    inverse = np.exp(-log_cosh_rms(gamma * units * unit))
    return (u if mode == "code" else unit) * inverse / (1 + 1e-8 * inverse)  # 1 / (R + 1e-8)


def auon(
    p,
    gradients,
    learning_rate,
    *,
    momentum=0.95,
    nesterov=True,
    gamma=1.0,
    mode="paper",
    steps=0,
    weight_decay=0.0,
    factor=width_factor,
):
    """The paper's AuON, ryyzn9/AuON with mode="code", Hybrid-AuON with steps: EMA, Nesterov."""
    p, m, path = float64(p), 0.0, []
    for g in map(float64, gradients):
        m = momentum * m + (1 - momentum) * g
        u = (1 - momentum) * g + momentum * m if nesterov else m
        if steps:
            u = newton_schulz(u, (MUON_TRIPLE,) * steps)
        o = cosh_direction(u, gamma, mode)
        p = p * (1 - learning_rate * weight_decay) - learning_rate * factor(*p.shape[-2:]) * o
        path.append(p)
    return path


def basis_matrix(name, n):
    """The columns that `low_rank` names, (n, n); "hadamard" for powers of two."""
    if name == "columns":
        return np.eye(n)
    if name == "hadamard":
        return scipy.linalg.hadamard(n) / n**0.5
    return scipy.fft.dct(np.eye(n), type={"dct": 2, "dct3": 3}[name], norm="ortho")


def shorter_last(x):
    """The matrix with its shorter side last; the rows, its fan-in, where it is square."""
    return mT(x) if x.shape[-2] <= x.shape[-1] else x


def largest_columns(x, rank, ranking="l2"):
    """Indices of the columns of largest norm, in increasing order."""
    norms = (np.abs(x) ** {"l1": 1, "l2": 2}[ranking]).sum(-2)
    return np.sort(np.argsort(-norms, kind="stable")[:rank])


def trion(
    p,
    gradients,
    learning_rate,
    rank,
    *,
    basis,
    momentum=0.95,
    ranking="l2",
    update_every=1,
    weight_decay=0.0,
    table=MUON_TABLE,
    factor=adam_rms_factor,
    orthogonalize=None,
):
    """Trion (2505.17967), Algorithm 1, and its code; `basis` holds the columns to choose from."""
    p = float64(p)
    m, path = np.zeros_like(shorter_last(p)), []
    for t, g in enumerate(gradients):
        m = m + shorter_last(float64(g))
        if t % update_every == 0:
            q = basis[:, largest_columns(m @ basis, rank, ranking)]
        a = m @ q
        m = m - (1 - momentum) * a @ q.T
        o = newton_schulz(a, table) if orthogonalize is None else orthogonalize(a)
        u = factor(*p.shape) * o @ q.T
        u = u if p.shape[0] > p.shape[1] else u.T
        p = p * (1 - learning_rate * weight_decay) - learning_rate * u
        path.append(p)
    return path


def dct_adamw(
    p,
    gradients,
    learning_rate,
    rank,
    *,
    basis,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    error_feedback=False,
    ranking="l2",
    update_every=1,
    bias_correction="per_index",
    weight_decay=0.0,
    keep=lambda mu, nu: mu,
):
    """DCT-AdamW (2505.17967) and its code: moments by index, zeros where it is not in use.

    Its bias correction counts all updates ("global"); "per_index" those since an index came in.
    `keep` makes what is stored of first moments, in the leaf's orientation.
    """
    p, path = float64(p), []
    error, mu, nu = (np.zeros_like(shorter_last(p)) for _ in range(3))
    age = np.zeros(len(basis))
    for t, g in enumerate(gradients):
        a = error + shorter_last(float64(g))
        if t % update_every == 0:
            used = np.zeros(len(basis), bool)
            used[largest_columns(a @ basis, rank, ranking)] = True
            mu, nu, age = mu * used, nu * used, age * used
        low = (a @ basis) * used
        if error_feedback:
            error = a - low @ basis.T
        mu = np.where(used, b1 * mu + (1 - b1) * low, 0)
        nu = np.where(used, b2 * nu + (1 - b2) * low**2, 0)
        age = age + used
        steps = np.maximum(age, 1) if bias_correction == "per_index" else t + 1
        u = (mu / (1 - b1**steps) / (np.sqrt(nu / (1 - b2**steps)) + eps)) @ basis.T
        u = u if p.shape[0] > p.shape[1] else u.T
        p = p * (1 - learning_rate * weight_decay) - learning_rate * u
        path.append(p)
        tall = p.shape[0] > p.shape[1]
        kept = mu[:, used], nu[:, used]
        mu[:, used] = keep(*kept) if tall else keep(*(x.T for x in kept)).T
    return path


def rows_in_256_levels(x):
    """To the nearest of 256 levels between the ends of each row."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    spacing = (high - low) / 255
    return low + np.round((x - low) / np.where(spacing > 0, spacing, 1)) * spacing


def spread(x, axis):
    """Coefficient of variation of the norms of the vectors along `axis`."""
    norms = np.sqrt((float64(x) ** 2).sum(axis))
    return norms.std() / norms.mean()


def well_conditioned(shape, dtype=np.float32, *, seed=0):
    """Matrices with singular values 1 to 1/2."""
    rng = np.random.default_rng(seed)
    *batch, m, n = shape
    spectrum = np.linspace(1.0, 0.5, min(m, n))
    count = int(np.prod(batch))
    x = [matrix_with_spectrum(rng, m, n, spectrum, dtype) for _ in range(count)]
    return np.reshape(x, shape)


def equations(program):
    """Every operation of a traced program (`jax.make_jaxpr`), those of its parts included."""
    for equation in program.eqns:
        yield equation
        for value in equation.params.values():
            for part in value if isinstance(value, tuple | list) else [value]:
                if hasattr(part, "eqns"):
                    yield from equations(part)


def matrix_products(program):
    """Shapes of the two factors of every matrix product of a traced program."""
    for equation in equations(program):
        if equation.primitive.name == "dot_general":
            yield tuple(variable.aval.shape for variable in equation.invars)

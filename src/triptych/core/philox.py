"""Counter-based random bits that no numpy release and no processor changes.

The bits are Philox4x64-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), keyed by a hash of what they
are for. Uniforms and normals follow from the bits by integer operations and +, -, *, /, sqrt alone, which IEEE 754 rounds
alike everywhere; `log` and `cos` of libm do not have that property, so the normal quantile brings its own logarithm.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Float = NDArray[np.float64]


def bits(stream: str, count: int, *, start: int = 0) -> NDArray[np.uint64]:
    """`count` 64-bit words of the stream, from word `start`: a pure function of (stream, start, count)."""
    key = np.frombuffer(hashlib.sha256(stream.encode()).digest()[:16], dtype="<u8")
    generator = np.random.Philox(key=key)
    generator.advance(start // 4)
    return generator.random_raw(count + start % 4)[start % 4 :]


def uniform(stream: str, shape: tuple[int, ...]) -> Float:
    """Uniform on the open interval (0, 1): the upper 52 bits at the centres of 2^52 cells."""
    words = bits(stream, int(np.prod(shape, dtype=np.int64)))
    return (((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52).reshape(shape)


def normal(stream: str, shape: tuple[int, ...]) -> Float:
    """Standard normal, by the quantile function."""
    return normal_quantile(uniform(stream, shape).ravel()).reshape(shape)


def permutation(stream: str, size: int) -> NDArray[np.int64]:
    """A permutation of range(size): a stable sort of random words."""
    return np.argsort(bits(stream, size), kind="stable").astype(np.int64)


# Wichura 1988, algorithm AS 241 (PPND16): numerator and denominator, highest power first.
_CENTRE = (
    (2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
     1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0),
    (5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
     5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0),
)  # fmt: skip
_MIDDLE = (
    (7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
     3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0),
    (1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
     6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0),
)  # fmt: skip
_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
     2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0),
    (2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
     1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0),
)  # fmt: skip


def normal_quantile(p: Float) -> Float:
    """Inverse of the standard normal distribution function on (0, 1), to about 1e-16 relative (AS 241)."""
    q = p - 0.5
    out: Float = q * _ratio(_CENTRE, 0.180625 - q * q)
    far = np.abs(q) > 0.425
    tail = np.where(q[far] < 0, p[far], 1.0 - p[far])
    r = np.sqrt(-log(tail))
    outer = np.where(r <= 5.0, _ratio(_MIDDLE, r - 1.6), _ratio(_TAIL, r - 5.0))
    out[far] = np.where(q[far] < 0, -outer, outer)
    return out


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Float) -> Float:
    numerator, denominator = (_horner(row, x) for row in coefficients)
    return numerator / denominator


def _horner(row: tuple[float, ...], x: Float) -> Float:
    value = np.full_like(x, row[0])
    for coefficient in row[1:]:
        value = value * x + coefficient
    return value


def log(x: Float) -> Float:
    """Natural logarithm of positive numbers by exact splitting and the area-tangent series: +, -, *, / only."""
    mantissa, exponent = np.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = np.where(low, mantissa * 2.0, mantissa)
    exponent = exponent - low
    s = (mantissa - 1.0) / (mantissa + 1.0)
    series = _horner(tuple(1.0 / (2 * k + 1) for k in range(12, -1, -1)), s * s)
    return exponent * 0.6931471805599453 + 2.0 * s * series

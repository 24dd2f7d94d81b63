"""Codebooks: the 24 Hurwitz units, secondaries for (seed, layer, head, role), codeword tables, radius levels.

Quaternions are (w, x, y, z) in the last axis; the product is Hamilton's. Everything here is exact IEEE arithmetic
(+, -, *, /, sqrt) on a counter-based bit stream, so every platform gets the same bits.
"""

from __future__ import annotations

import hashlib
import itertools
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError
from hqmq_trt.scheme import ROLES, Gain, RoleScheme

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_DATA = "data/codebooks.npz"
_SIGNS = list(itertools.product((1.0, -1.0), repeat=3))

HALF_PRIMARIES: F64 = np.concatenate([np.eye(4), [(0.5, 0.5 * x, 0.5 * y, 0.5 * z) for z, y, x in _SIGNS]])
"""The 12 Hurwitz units up to sign. 0…3: axes 1, i, j, k. 4 + n1 + 2*n2 + 4*n3: ½(1 ± i ± j ± k), n = 1 for minus."""

PRIMARIES: F64 = np.concatenate([HALF_PRIMARIES, -HALF_PRIMARIES])
"""2T, all 24 Hurwitz units."""


def multiply(a: F64, b: F64) -> F64:
    """Hamilton product of quaternions [..., 4] (broadcast), in float64, terms summed left to right."""
    aw, ax, ay, az = np.moveaxis(a, -1, 0)
    bw, bx, by, bz = np.moveaxis(b, -1, 0)
    return np.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        axis=-1,
    )


def haar(count: int, *key: int) -> F64:
    """`count` unit quaternions [count, 4], Haar-distributed on S³, from a key of non-negative integers.

    Marsaglia (1972): two uniform points of the unit disc give one quaternion; square root and division only.
    The bits are Philox 4x64 counters (numpy guarantees its stream).
    """
    bits = np.random.Philox(np.random.SeedSequence(key))
    points: F64 = np.empty((0, 2))
    while len(points) < 2 * count:
        raw = bits.random_raw(8 * count + 16) >> np.uint64(11)
        uniform = (raw.astype(np.float64) * 2.0**-52 - 1.0).reshape(-1, 2)
        norm = uniform[:, 0] * uniform[:, 0] + uniform[:, 1] * uniform[:, 1]
        points = np.concatenate([points, uniform[(norm < 1.0) & (norm > 0.0)]])
    pairs = points[: 2 * count].reshape(count, 2, 2)
    first = pairs[:, 0, 0] ** 2 + pairs[:, 0, 1] ** 2
    second = pairs[:, 1, 0] ** 2 + pairs[:, 1, 1] ** 2
    stretch = np.sqrt((1.0 - first) / second)
    return np.concatenate([pairs[:, 0], pairs[:, 1] * stretch[:, None]], axis=1)


@cache
def _data() -> dict[str, NDArray[np.float64]]:
    """Arrays of data/codebooks.npz (made by ``python -m hqmq_trt.codebook_search``)."""
    with resources.files("hqmq_trt").joinpath(_DATA).open("rb") as file, np.load(file) as arrays:
        return {name: arrays[name] for name in arrays.files}


def optimised(secondaries: int) -> F64:
    """The optimised secondaries [S, 4], before they are turned."""
    name = f"secondaries_{secondaries}"
    if name not in _data():
        raise HqmqError(f"no optimised secondaries for S={secondaries} in {_DATA}; run hqmq_trt.codebook_search")
    return _data()[name]


def secondaries(role: RoleScheme, seed: int, layer: int, num_kv_heads: int, role_name: str) -> F32:
    """Secondaries of one layer and role, float32 [num_kv_heads, S, 4].

    Haar schemes draw S quaternions a head (paper §3); optimised ones turn one set by a random unit quaternion on
    the right, which keeps its packing.
    """
    which = ROLES.index(role_name)
    heads = []
    for head in range(num_kv_heads):
        key = (seed, layer, head, which)
        if role.optimised:
            heads.append(multiply(optimised(role.secondaries), haar(1, *key)))
        else:
            heads.append(haar(role.secondaries, *key))
    return np.stack(heads).astype(np.float32)


def levels(role: RoleScheme) -> F32:
    """Radius levels, float32 [2^r], ascending: 0…2^r-1 (MAX) or Lloyd-Max levels (RMS)."""
    if role.gain is Gain.MAX:
        return np.arange(2**role.radius_bits, dtype=np.float32)
    name = f"levels_{role.secondaries}_{role.radius_bits}"
    if name not in _data():
        raise HqmqError(f"no radius levels for S={role.secondaries}, r={role.radius_bits} in {_DATA}")
    return _data()[name].astype(np.float32)


def codewords(secondaries: F32) -> F32:
    """The 12*S codewords up to sign, float32 [..., 12*S, 4]; word s*12 + p is HALF_PRIMARIES[p] * secondary s."""
    words = multiply(HALF_PRIMARIES, secondaries.astype(np.float64)[..., :, None, :])
    return words.reshape(*secondaries.shape[:-2], -1, 4).astype(np.float32)


def digest(array: F32) -> str:
    """sha256 of the little-endian bytes of a codebook or level table."""
    return hashlib.sha256(np.ascontiguousarray(array, dtype="<f4").tobytes()).hexdigest()

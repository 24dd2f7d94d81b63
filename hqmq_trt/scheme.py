"""Schemes: which codec each role (K or V) of the cache uses. The only place that knows the presets.

A scheme is written as

* ``hq2.5``, ``hq3``, ``hq3.5``, ``hq4``, ``hq5``: our presets (see :data:`PRESETS`); ``hq2.5`` is for V,
* ``hq:s{S}_r{r}[-hadamard][-mean][-sinks][+med3]``: the parts of a preset in other measures, for finding
  better ones; S one of :data:`OPTIMISED_SECONDARIES`, r in 2…6,
* ``paper:s{S}_r{r}[+med3]``: arXiv 2605.27646 to the letter, S in 1…1024, r in 1…8,
* ``fp16``: the same plumbing with nothing compressed,
* ``k=<scheme>,v=<scheme>``: K and V differ,

each with an optional ``@p{page}`` at the end, for instance ``hq4@p128``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from enum import IntEnum

from hqmq_trt.errors import HqmqError

ROLES = ("key", "value")
DEFAULT_PAGE_SIZE = 64
MAX_SECONDARIES = 1024
MAX_RADIUS_BITS = 8
OUTLIER_FACTOR = 3.0
"""C of Med3x (paper): a chunk is an outlier when its norm exceeds C times the median of its page."""
DEFAULT_OUTLIER_FRACTION = 1 / 8
"""Share of a page's chunks that may be outliers; K averages 5-10 %, single layers reach 25 %."""
DEFAULT_SINK_TOKENS = 4
"""First tokens of a sequence that our schemes keep exact: attention sinks (StreamingLLM, arXiv 2309.17453)."""
MAX_SINK_TOKENS = 8
"""A page has at least as many tokens."""


class Storage(IntEnum):
    """How `codes` holds a token (values are part of the operator contract)."""

    FP16 = 0
    HQMQ = 1


class Gain(IntEnum):
    """How a chunk's radius is quantised (values are part of the operator contract).

    MAX: paper. Levels 0…2^r-1 times a scale of (largest norm of the token) / (2^r-1); radius = norm.
    RMS: ours. Lloyd-Max levels times the RMS of the token's elements; radius = projection on the codeword.
    """

    MAX = 0
    RMS = 1


@dataclass(frozen=True)
class RoleScheme:
    """The codec of one role.

    Attributes:
        name: canonical spelling, for instance ``hq4`` or ``paper:s96_r4+med3``.
        storage: packed quaternion codes, or plain fp16.
        secondaries: S, number of secondary quaternions; the codebook has 24*S words.
        radius_bits: r, bits of the quantised radius.
        optimised: secondaries optimised offline (ours) instead of Haar-random (paper).
        gain: how the radius is quantised.
        hadamard: rotate head_dim by an orthonormal Walsh-Hadamard matrix before quantising.
        page_mean: store the token minus the mean of its page.
        outlier_fraction: capacity for Med3x outliers as a share of a page's chunks; 0 switches Med3x off.
        sink_tokens: N, first tokens of a sequence that are read exactly, from fp16, whatever page 0 holds of them.
    """

    name: str
    storage: Storage = Storage.HQMQ
    secondaries: int = 1
    radius_bits: int = 1
    optimised: bool = False
    gain: Gain = Gain.MAX
    hadamard: bool = False
    page_mean: bool = False
    outlier_fraction: float = 0.0
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.secondaries <= MAX_SECONDARIES:
            raise HqmqError(f"scheme '{self.name}': S={self.secondaries} secondaries is outside 1…{MAX_SECONDARIES}")
        if not 1 <= self.radius_bits <= MAX_RADIUS_BITS:
            raise HqmqError(f"scheme '{self.name}': r={self.radius_bits} radius bits is outside 1…{MAX_RADIUS_BITS}")
        if not 0.0 <= self.outlier_fraction <= 1.0:
            raise HqmqError(f"scheme '{self.name}': outlier fraction {self.outlier_fraction} is outside 0…1")
        if not 0 <= self.sink_tokens <= MAX_SINK_TOKENS:
            raise HqmqError(f"scheme '{self.name}': {self.sink_tokens} sink tokens are outside 0…{MAX_SINK_TOKENS}")

    @property
    def med3(self) -> bool:
        """Whether outliers are kept in fp16 (paper, Med3x)."""
        return self.outlier_fraction > 0

    @property
    def packed(self) -> bool:
        """Whether tokens are stored as quaternion codes."""
        return self.storage is Storage.HQMQ

    @property
    def index_bits(self) -> int:
        """Whole bits that index one of 12*S codewords up to sign."""
        return math.ceil(math.log2(12 * self.secondaries))

    @property
    def code_bits(self) -> int:
        """Stored bits of one chunk: codeword index, radius level, sign."""
        return self.index_bits + self.radius_bits + 1

    @property
    def scale_bits(self) -> int:
        """Stored bits of a token's scale: 8 (a short scale, hqmq_trt.format) with gain RMS, 16 (fp16) with MAX."""
        return 8 if self.gain is Gain.RMS else 16

    def outlier_capacity(self, head_dim: int, page_size: int) -> int:
        """Outlier slots of one page and head, in chunks."""
        return math.ceil(self.outlier_fraction * page_size * (head_dim // 4)) if self.med3 else 0

    def check_head_dim(self, head_dim: int) -> None:
        """Raise HqmqError when vectors of `head_dim` elements cannot be coded."""
        if head_dim <= 0 or head_dim % 4:
            raise HqmqError(
                f"head_dim {head_dim} is not divisible by 4: HQMQ codes chunks of four elements; "
                "use scheme fp16 or another model"
            )
        if self.hadamard and head_dim & (head_dim - 1):
            raise HqmqError(
                f"scheme '{self.name}' rotates by a Hadamard matrix and needs head_dim to be a power of two, "
                f"not {head_dim}; use a paper:s{{S}}_r{{r}} scheme"
            )


def _hq(name: str, secondaries: int, radius_bits: int) -> tuple[RoleScheme, RoleScheme]:
    value = RoleScheme(
        name,
        secondaries=secondaries,
        radius_bits=radius_bits,
        optimised=True,
        gain=Gain.RMS,
        hadamard=True,
        sink_tokens=DEFAULT_SINK_TOKENS,
    )
    return replace(value, page_mean=True), value


_FP16 = RoleScheme("fp16", storage=Storage.FP16)
PRESETS: dict[str, tuple[RoleScheme, RoleScheme]] = {
    "hq2.5": _hq("hq2.5", 10, 2),
    "hq3": _hq("hq3", 21, 3),
    "hq3.5": _hq("hq3.5", 85, 3),
    "hq4": _hq("hq4", 170, 4),
    "hq5": _hq("hq5", 682, 6),
    "fp16": (_FP16, _FP16),
}
"""Preset name → (key codec, value codec). To change a preset, edit this table."""

OPTIMISED_SECONDARIES = (5, 10, 21, 42, 85, 170, 341, 682)
"""S for which data/codebooks.npz holds optimised secondaries: floor(2^k / 24) fills whole bits.

With 5 (r = 3) and 10 (r = 2: hq2.5) a code has 10 bits, which at head_dim 64 fill 5 words a token.
"""

OPTIMISED_RADIUS_BITS = (2, 3, 4, 5, 6)
"""r for which data/codebooks.npz holds Lloyd-Max levels, for each of OPTIMISED_SECONDARIES."""

_PAPER = re.compile(r"paper:s(\d+)_r(\d+)(\+med3)?")
_OURS = re.compile(r"hq:s(\d+)_r(\d+)(-hadamard)?(-mean)?(-sinks)?(\+med3)?")
_PLAIN_PARTS = re.compile(r"hq:s(\d+)_r(\d+)(?![\w+-])")
_ALIKE = re.compile(r"k=([^,@#]+),v=\1(?=[@#]|$)")
_ROLES = re.compile(r"k=([^,]+),v=([^,]+)")
_PAGE = re.compile(r"(.*)@p(\d+)")


def preset_spelling(name: str) -> str:
    """A scheme's spelling, or a longer one that holds it, with presets in place of the parts they are made of:
    ``k=hq3,v=hq:s10_r2@p16`` is ``k=hq3,v=hq2.5@p16``. Schemes that are one by content have one such spelling, which
    tells whether results were measured with the same one; :attr:`Scheme.name` keeps what was asked for."""
    presets = {(role.secondaries, role.radius_bits): role.name for _, role in PRESETS.values() if role.packed}
    named = _PLAIN_PARTS.sub(lambda match: presets.get((int(match[1]), int(match[2])), match[0]), name)
    return _ALIKE.sub(r"\1", named)


@dataclass(frozen=True)
class Scheme:
    """A whole scheme: the codecs of K and V and the page they share.

    Attributes:
        key, value: codec of each role.
        page_size: P, tokens of one page; a power of two.
        seed: seed of the codebooks (Haar secondaries, or the turn of the optimised ones).
    """

    key: RoleScheme
    value: RoleScheme
    page_size: int = DEFAULT_PAGE_SIZE
    seed: int = 0

    def __post_init__(self) -> None:
        if not 8 <= self.page_size <= 1024 or self.page_size & (self.page_size - 1):
            raise HqmqError(f"page size {self.page_size} is not a power of two in 8…1024; choose 32, 64, 128 or 256")
        if not 0 <= self.seed < 2**63:
            raise HqmqError(f"seed {self.seed} is outside 0…2^63-1")

    @property
    def name(self) -> str:
        """Canonical spelling; ``Scheme.parse(s.name, s.seed) == s``."""
        base = self.key.name if self.key.name == self.value.name else f"k={self.key.name},v={self.value.name}"
        return base if self.page_size == DEFAULT_PAGE_SIZE else f"{base}@p{self.page_size}"

    def role(self, role: str) -> RoleScheme:
        """The codec of ``"key"`` or ``"value"``."""
        return {"key": self.key, "value": self.value}[role]

    def check_head_dim(self, head_dim: int) -> None:
        """Raise HqmqError when this scheme cannot code heads of `head_dim` elements."""
        for role in (self.key, self.value):
            if role.packed:
                role.check_head_dim(head_dim)
        if head_dim % 2:
            raise HqmqError(f"head_dim {head_dim} is odd: two fp16 elements share a word")

    @staticmethod
    def parse(text: str, seed: int = 0) -> Scheme:
        """Parse the spelling described in the module docstring.

        Raises:
            HqmqError: unknown spelling, or a value outside its range.
        """
        body, page = text.strip(), DEFAULT_PAGE_SIZE
        if match := _PAGE.fullmatch(body):
            body, page = match[1], int(match[2])
        names = tuple(match.groups()) if (match := _ROLES.fullmatch(body)) else (body, body)
        key, value = (_pair(name, text) for name in names)
        return Scheme(key[0], value[1], page, seed)


def _pair(name: str, text: str) -> tuple[RoleScheme, RoleScheme]:
    if name in PRESETS:
        return PRESETS[name]
    if match := _OURS.fullmatch(name):
        return _ours(name, int(match[1]), int(match[2]), *(part is not None for part in match.groups()[2:]))
    if match := _PAPER.fullmatch(name):
        secondaries, radius_bits = int(match[1]), int(match[2])
        canonical = f"paper:s{secondaries}_r{radius_bits}{match[3] or ''}"
        role = RoleScheme(
            canonical,
            secondaries=secondaries,
            radius_bits=radius_bits,
            outlier_fraction=DEFAULT_OUTLIER_FRACTION if match[3] else 0.0,
        )
        return role, role
    raise HqmqError(
        f"unknown scheme '{text}': use one of {', '.join(PRESETS)}, paper:s{{S}}_r{{r}}[+med3], "
        "hq:s{S}_r{r}[-hadamard][-mean][-sinks][+med3], or k=<scheme>,v=<scheme>, each with an optional @p{page}"
    )


def _ours(
    name: str, secondaries: int, radius_bits: int, no_hadamard: bool, no_mean: bool, no_sinks: bool, med3: bool
) -> tuple[RoleScheme, RoleScheme]:
    if secondaries not in OPTIMISED_SECONDARIES or radius_bits not in OPTIMISED_RADIUS_BITS:
        known = ", ".join(map(str, OPTIMISED_SECONDARIES))
        raise HqmqError(
            f"scheme '{name}': optimised codebooks exist for S in {known} and r in {OPTIMISED_RADIUS_BITS[0]}…"
            f"{OPTIMISED_RADIUS_BITS[-1]}; paper:s{{S}}_r{{r}} takes any"
        )
    key, value = _hq(f"hq:s{secondaries}_r{radius_bits}", secondaries, radius_bits)
    flags = "-hadamard" * no_hadamard + "-mean" * no_mean + "-sinks" * no_sinks + "+med3" * med3

    def changed(role: RoleScheme, mean: bool) -> RoleScheme:
        return replace(
            role,
            name=role.name + flags,
            hadamard=not no_hadamard,
            page_mean=mean,
            sink_tokens=0 if no_sinks else role.sink_tokens,
            outlier_fraction=DEFAULT_OUTLIER_FRACTION if med3 else 0.0,
        )

    return changed(key, not no_mean), changed(value, False)

"""How one side (K or V) of one layer is stored: codes, scales, static transform.

Knows nothing of offsets (`layout.py`) or of how codes are computed (`codec.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType


class FormatError(ValueError):
    """A KV format or policy that does not exist or cannot be stored. Says what to write instead."""


class Codes(StrEnum):
    """The type of the stored numbers."""

    FP32 = "fp32"  # exact passthrough, CPU only: for tests of exactness
    BF16 = "bf16"
    FP8 = "fp8"  # e4m3, saturating
    INT8 = "int8"  # symmetric, stored offset-binary: q + 128, q in -127..127
    INT4 = "int4"  # dynamic scales: asymmetric, q in 0..15 with integer zero; static scales: q - 8 in -7..7

    @property
    def bits(self) -> int:
        return _BITS[self]

    @property
    def quantized(self) -> bool:
        """Tell whether codes have at most 8 bits: their V codes are stored transposed, [d][token]."""
        return self.bits <= 8


_BITS: Mapping[Codes, int] = MappingProxyType(
    {Codes.FP32: 32, Codes.BF16: 16, Codes.FP8: 8, Codes.INT8: 8, Codes.INT4: 4}
)


class Scales(StrEnum):
    """The source of a code's scale."""

    NONE = "none"  # the codes are the numbers
    TOKEN = "token"  # dynamic: one per token, kv head and group of channels, stored in the page
    STATIC = "static"  # calibrated, per head or per channel: the static transform's `scale`


class Transform(StrEnum):
    """The static affine map applied before quantization (see `transform.py`)."""

    IDENTITY = "identity"
    HADAMARD = "hadamard"
    AFFINE = "affine"  # per-channel shift and scale
    AFFINE_HADAMARD = "affine_hadamard"

    @property
    def affine(self) -> bool:
        """Whether it has shifts and scales, which only a calibration can tell."""
        return self in (Transform.AFFINE, Transform.AFFINE_HADAMARD)


@dataclass(frozen=True, slots=True)
class KVFormat:
    """One side of one layer.

    Example: `KVFormat(Codes.INT4, Scales.TOKEN, transform=Transform.HADAMARD)` is either side of `int4`.
    """

    codes: Codes
    scales: Scales
    group: int = 0
    """Channels that share one dynamic scale; 0 means all `head_dim` of them."""
    transform: Transform = Transform.IDENTITY

    def __post_init__(self) -> None:
        if self.codes.quantized == (self.scales is Scales.NONE):
            raise FormatError(f"{self.codes} codes cannot have scales={self.scales}")
        if self.group and self.scales is not Scales.TOKEN:
            raise FormatError("group applies to dynamic scales only (scales=token)")
        if self.group < 0:
            raise FormatError(f"group is a number of channels, got {self.group}")

    def groups(self, head_dim: int) -> int:
        """Count dynamic scales per token and head. Raises FormatError if groups do not fit `head_dim`."""
        if self.scales is not Scales.TOKEN:
            return 0
        size = self.group or head_dim
        if head_dim % size or (self.codes is Codes.INT4 and size < head_dim and (head_dim // 2) % size):
            raise FormatError(
                f"groups of {size} channels do not fit head_dim {head_dim}; "
                f"use {head_dim} (one per token) or a divisor of {head_dim // 2}"
            )
        return head_dim // size

    @property
    def scale_bytes(self) -> int:
        """Bytes of one dynamic scale: fp16, for int4 followed by its integer zero as fp16."""
        return 4 if self.codes is Codes.INT4 else 2


@dataclass(frozen=True, slots=True)
class LayerFormat:
    """The formats of both sides of one layer."""

    k: KVFormat
    v: KVFormat


def _same(
    codes: Codes, scales: Scales, group: int = 0, transform: Transform = Transform.IDENTITY
) -> LayerFormat:
    side = KVFormat(codes, scales, group, transform)
    return LayerFormat(side, side)


_HADAMARD = Transform.HADAMARD
_INT8 = LayerFormat(
    KVFormat(Codes.INT8, Scales.TOKEN, transform=_HADAMARD), KVFormat(Codes.INT8, Scales.TOKEN)
)
_INT4 = _same(Codes.INT4, Scales.TOKEN, transform=_HADAMARD)
FORMATS: Mapping[str, LayerFormat] = MappingProxyType(
    {
        "fp32": _same(Codes.FP32, Scales.NONE),
        "bf16": _same(Codes.BF16, Scales.NONE),
        "fp8": _same(Codes.FP8, Scales.STATIC),
        "int8": _INT8,
        "int4": _INT4,
        "int4g64": _same(Codes.INT4, Scales.TOKEN, group=64, transform=_HADAMARD),
        "int4g32": _same(Codes.INT4, Scales.TOKEN, group=32, transform=_HADAMARD),
        "k8v4": LayerFormat(_INT8.k, _INT4.v),
    }
)
"""The formats that have a name. A policy may name another one for each layer and side, or spell it out."""


def layer_formats(policy: str | Mapping[str, object], num_layers: int) -> tuple[LayerFormat, ...]:
    """Return the format of every layer under a policy.

    `policy` is a format's name or a mapping:
    `{"default": {"k": "int8", "v": "int4"}, "layers": {"0": {"k": "bf16", "v": "bf16"}}}`, where a side is a
    format's name or `{"codes": "int8", "scales": "token", "group": 64, "transform": "hadamard"}`.
    Raises FormatError for an unknown name, key or layer.
    """
    if isinstance(policy, str):
        return (_named(policy),) * num_layers
    unknown = set(policy) - {"default", "layers"}
    if unknown or "default" not in policy:
        raise FormatError(f'a KV policy has the keys "default" and "layers", got {sorted(policy)}')
    formats = [_both_sides(policy["default"])] * num_layers
    layers = policy.get("layers", {})
    if not isinstance(layers, Mapping):
        raise FormatError('"layers" of a KV policy maps a layer number to {"k": ..., "v": ...}')
    for key, sides in layers.items():
        if not str(key).isdecimal() or int(key) >= num_layers:
            raise FormatError(f"KV policy names layer {key!r}; the model has layers 0..{num_layers - 1}")
        formats[int(key)] = _both_sides(sides)
    return tuple(formats)


def spelled(formats: Sequence[LayerFormat]) -> dict[str, object]:
    """The policy of which `layer_formats` makes these formats: one that spells out every side."""
    ((default, _),) = Counter(formats).most_common(1)
    others = {str(i): _sides(f) for i, f in enumerate(formats) if f != default}
    return {"default": _sides(default), "layers": others}


def _sides(fmt: LayerFormat) -> dict[str, dict[str, object]]:
    return {"k": _side(fmt.k), "v": _side(fmt.v)}


def _side(fmt: KVFormat) -> dict[str, object]:
    return {
        "codes": fmt.codes.value,
        "scales": fmt.scales.value,
        "group": fmt.group,
        "transform": fmt.transform.value,
    }


def _named(name: str) -> LayerFormat:
    if name not in FORMATS:
        raise FormatError(f"unknown KV format {name!r}; choose {', '.join(FORMATS)}, or the path of a policy")
    return FORMATS[name]


def _both_sides(sides: object) -> LayerFormat:
    if not isinstance(sides, Mapping) or set(sides) != {"k", "v"}:
        raise FormatError(f'a KV policy entry is {{"k": format, "v": format}}, got {sides!r}')
    k, v = sides["k"], sides["v"]
    return LayerFormat(
        _named(k).k if isinstance(k, str) else _spelled_out(k),
        _named(v).v if isinstance(v, str) else _spelled_out(v),
    )


def _spelled_out(spec: object) -> KVFormat:
    if not isinstance(spec, Mapping) or set(spec) - {"codes", "scales", "group", "transform"}:
        raise FormatError(f"a KV format is a name or {{codes, scales, group, transform}}, got {spec!r}")
    try:
        return KVFormat(
            Codes(spec["codes"]),
            Scales(spec["scales"]),
            int(spec.get("group", 0)),
            Transform(spec.get("transform", "identity")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"KV format {spec!r}: {error}") from error

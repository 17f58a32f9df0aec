"""How one side (K or V) of one layer is stored: codes, scales, static transform.

Knows nothing of offsets (`layout.py`) or of how codes are computed (`codec.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
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


@dataclass(frozen=True, slots=True)
class KVFormat:
    """One side of one layer.

    Example: `KVFormat(Codes.INT4, Scales.TOKEN, group=0, transform=Transform.HADAMARD)` is `int4`.
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


_HADAMARD = Transform.HADAMARD
FORMATS: Mapping[str, KVFormat] = MappingProxyType(
    {
        "fp32": KVFormat(Codes.FP32, Scales.NONE),
        "bf16": KVFormat(Codes.BF16, Scales.NONE),
        "fp8": KVFormat(Codes.FP8, Scales.STATIC),
        "int8": KVFormat(Codes.INT8, Scales.TOKEN),
        "int4": KVFormat(Codes.INT4, Scales.TOKEN, transform=_HADAMARD),
        "int4g64": KVFormat(Codes.INT4, Scales.TOKEN, group=64, transform=_HADAMARD),
        "int4g32": KVFormat(Codes.INT4, Scales.TOKEN, group=32, transform=_HADAMARD),
        "int8c": KVFormat(Codes.INT8, Scales.STATIC, transform=Transform.AFFINE),
        "int4c": KVFormat(Codes.INT4, Scales.STATIC, transform=Transform.AFFINE),
    }
)
"""Formats with a name; any other `KVFormat` can be written out in a policy file."""

_POLICIES: Mapping[str, tuple[str, str]] = MappingProxyType({"k8v4": ("int8", "int4")})


def named_format(name: str) -> KVFormat:
    """Return the format called `name`. Raises FormatError, which lists the names."""
    if name not in FORMATS:
        raise FormatError(f"unknown KV format {name!r}; choose {', '.join(FORMATS)}")
    return FORMATS[name]


def layer_formats(policy: str | Mapping[str, object], num_layers: int) -> tuple[LayerFormat, ...]:
    """Return the format of every layer under a policy.

    `policy` is a format's name, `k8v4`, or a mapping as a policy file holds it:
    `{"default": {"k": "int8", "v": "int4"}, "layers": {"0": {"k": "bf16", "v": "bf16"}}}`.
    Raises FormatError for an unknown name, key or layer.
    """
    if isinstance(policy, str):
        k, v = _POLICIES.get(policy, (policy, policy))
        if policy not in _POLICIES and policy not in FORMATS:
            names = ", ".join([*FORMATS, *_POLICIES])
            raise FormatError(f"unknown KV format {policy!r}; choose {names}, or the path of a policy file")
        return (LayerFormat(named_format(k), named_format(v)),) * num_layers
    unknown = set(policy) - {"default", "layers"}
    if unknown or "default" not in policy:
        raise FormatError(f'a KV policy has the keys "default" and "layers", got {sorted(policy)}')
    formats = [_both_sides(policy["default"])] * num_layers
    layers = policy.get("layers", {})
    if not isinstance(layers, Mapping):
        raise FormatError('"layers" of a KV policy maps a layer number to {"k": ..., "v": ...}')
    for key, sides in layers.items():
        if not str(key).isdigit() or int(key) >= num_layers:
            raise FormatError(f"KV policy names layer {key!r}; the model has layers 0..{num_layers - 1}")
        formats[int(key)] = _both_sides(sides)
    return tuple(formats)


def _both_sides(sides: object) -> LayerFormat:
    if not isinstance(sides, Mapping) or set(sides) != {"k", "v"}:
        raise FormatError(f'a KV policy entry is {{"k": format, "v": format}}, got {sides!r}')
    return LayerFormat(_one_side(sides["k"]), _one_side(sides["v"]))


def _one_side(spec: object) -> KVFormat:
    if isinstance(spec, str):
        return named_format(spec)
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

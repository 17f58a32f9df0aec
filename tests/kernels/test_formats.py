"""Names, policies and the rules of what can be stored how."""

from __future__ import annotations

import pytest

from quire.kernels.formats import (
    FORMATS,
    Codes,
    FormatError,
    KVFormat,
    LayerFormat,
    Scales,
    layer_formats,
    spelled,
)

INT8 = {"k": "int8", "v": "int8"}


def test_an_unknown_name_is_answered_with_the_names_there_are() -> None:
    with pytest.raises(FormatError, match=r"'int3'.*fp32, bf16, fp8, int8, int4.*k8v4.*path of a policy"):
        layer_formats("int3", 2)


@pytest.mark.parametrize("name", FORMATS)
def test_a_formats_name_is_a_policy_for_every_layer(name: str) -> None:
    assert layer_formats(name, 3) == (FORMATS[name],) * 3


def test_eight_bit_keys_are_rotated_and_values_are_not() -> None:
    assert [side.transform for side in (FORMATS["int8"].k, FORMATS["int8"].v)] == ["hadamard", "identity"]


def test_k8v4_gives_keys_the_bits() -> None:
    assert FORMATS["k8v4"] == LayerFormat(FORMATS["int8"].k, FORMATS["int4"].v)


def test_a_policy_names_exceptions_by_layer_and_spells_out_formats() -> None:
    spelled = {"codes": "int4", "scales": "token", "group": 32, "transform": "hadamard"}
    policy = {"default": {"k": "int8", "v": spelled}, "layers": {"2": {"k": "bf16", "v": "fp8"}}}
    formats = layer_formats(policy, 3)
    assert formats[0] == formats[1] == LayerFormat(FORMATS["int8"].k, FORMATS["int4g32"].v)
    assert formats[2] == LayerFormat(FORMATS["bf16"].k, FORMATS["fp8"].v)


@pytest.mark.parametrize(
    "policy", ["int8", {"default": {"k": "int8", "v": "int4g32"}, "layers": {"1": INT8}}]
)
def test_formats_that_are_spelled_out_are_read_as_the_same(policy: str | dict[str, object]) -> None:
    formats = layer_formats(policy, 4)
    assert layer_formats(spelled(formats), 4) == formats


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"default": INT8, "layer": {}}, '"default" and "layers"'),
        ({"layers": {}}, '"default" and "layers"'),
        ({"default": {"k": "int8"}}, r'"k": format, "v": format'),
        ({"default": "int8"}, r'"k": format, "v": format'),
        ({"default": {"k": "int8", "v": "int9"}}, "unknown KV format 'int9'"),
        ({"default": {"k": "int8", "v": 8}}, "a name or"),
        ({"default": {"k": "int8", "v": {"codes": "int4", "scale": "token"}}}, "a name or"),
        ({"default": {"k": "int8", "v": {"codes": "int5", "scales": "token"}}}, "int5"),
        ({"default": {"k": "int8", "v": {"codes": "int8"}}}, "scales"),
        ({"default": INT8, "layers": {"3": INT8}}, r"layers 0\.\.2"),
        ({"default": INT8, "layers": {"-1": INT8}}, "'-1'"),
        ({"default": INT8, "layers": [1]}, "maps a layer number"),
    ],
)  # fmt: skip
def test_a_policy_with_a_mistake_is_refused_and_the_mistake_named(
    policy: dict[str, object], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        layer_formats(policy, 3)


@pytest.mark.parametrize(
    ("codes", "scales", "group"),
    [
        (Codes.BF16, Scales.TOKEN, 0),
        (Codes.FP32, Scales.STATIC, 0),
        (Codes.INT8, Scales.NONE, 0),
        (Codes.INT4, Scales.STATIC, 32),
        (Codes.INT4, Scales.TOKEN, -1),
    ],
)
def test_codes_and_scales_that_exclude_each_other_are_refused(
    codes: Codes, scales: Scales, group: int
) -> None:
    with pytest.raises(FormatError):
        KVFormat(codes, scales, group)


def test_groups_count_the_dynamic_scales_of_a_token() -> None:
    assert FORMATS["int8"].k.groups(80) == 1
    assert FORMATS["int4g32"].k.groups(128) == 4
    assert FORMATS["fp8"].k.groups(128) == FORMATS["bf16"].k.groups(128) == 0


@pytest.mark.parametrize("head_dim", [48, 96])
def test_an_int4_group_may_not_straddle_the_two_nibbles(head_dim: int) -> None:
    with pytest.raises(FormatError, match=f"use {head_dim} .* or a divisor of {head_dim // 2}"):
        FORMATS["int4g32"].k.groups(head_dim)


def test_only_codes_of_eight_bits_and_less_count_as_quantized() -> None:
    assert {codes for codes in Codes if codes.quantized} == {Codes.FP8, Codes.INT8, Codes.INT4}

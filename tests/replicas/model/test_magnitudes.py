"""Answers do not depend on the magnitude of keys and values, in any format and however sharded."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scaled_models import Factors, write_scaled
from side_formats import SIDES
from tiny_models import Ranks, make_model, reference_logits, some_tokens, tiny_config
from torch import Tensor

from quire.replicas.model.magnitudes import static_exponent
from quire.replicas.runner.shard import Shard

IDS = some_tokens(120)
PAGES = range(1, 9)
SERVED = ["bf16", "fp8", "int8", "int4", "int4g32", "k8v4"]
UNROTATED = {"default": {"k": {"codes": "int8", "scales": "token"}, "v": "int8"}}
SCALED: dict[str, Factors] = {
    "V x 1e-4": {"v_proj": (1e-4, 1e-4)},
    "V x 1e-3": {"v_proj": (1e-3, 1e-3)},
    "V x 1e4": {"v_proj": (1e4, 1e4)},
    "K x 1e-4": {"k_proj": (1e-4, 1e-4)},
    "K x 1e3": {"k_proj": (1e3, 1e3)},
    "K x 1e4": {"k_proj": (1e4, 1e4)},
    "heads apart": {"k_proj": (3e3, 1.0), "v_proj": (1e-4, 2e4)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("scaled")
    plain = make_model("llama", base / "plain")
    return {"plain": plain} | {
        name: write_scaled(plain, base / name, factors) for name, factors in SCALED.items()
    }


@pytest.fixture(scope="module")
def expected(folders) -> Tensor:
    return reference_logits(folders["plain"], IDS).log_softmax(-1)


def error(folder: Path, kv: str, expected: Tensor) -> float:
    with Ranks(tiny_config(folder, kv)) as ranks:
        return float((ranks.run(IDS, [120], PAGES).log_softmax(-1) - expected).abs().mean())


@pytest.fixture(scope="module")
def own_errors(folders, expected) -> dict[str, float]:
    return {kv: error(folders["plain"], kv, expected) for kv in SERVED}


@pytest.mark.parametrize("kv", SERVED)
@pytest.mark.parametrize("name", SCALED)
def test_the_error_of_a_format_does_not_depend_on_magnitudes(name, kv, folders, expected, own_errors):
    assert error(folders[name], kv, expected) < 1.5 * own_errors[kv]


@pytest.mark.parametrize("kv", ["fp8", "int4"])
def test_scaled_steps_give_the_same_bits_in_any_chunks(kv, folders):
    with Ranks(tiny_config(folders["heads apart"], kv)) as ranks:
        whole = ranks.run(IDS, [120], PAGES)
        assert torch.equal(ranks.run(IDS, [37, 1, 1, 48, 33], PAGES), whole)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kv", ["fp8", "int8"])
def test_all_numbers_of_shards_come_to_the_same_scales(kv, tp, folders):
    with Ranks(tiny_config(folders["heads apart"], kv)) as one:
        fingerprint, logits = one.shards[0].transforms_fingerprint, one.run(IDS, [120], PAGES)
    with Ranks(tiny_config(folders["heads apart"], kv, tp=tp)) as ranks:
        assert {shard.transforms_fingerprint for shard in ranks.shards} == {fingerprint}
        assert (ranks.run(IDS, [120], PAGES) - logits).abs().mean() < 0.02 * logits.abs().mean()


def test_block_keys_tell_scaled_pages_from_others(folders):
    names = ["plain", "V x 1e-4", "V x 1e4", "K x 1e4", "heads apart"]
    shards = [Shard(tiny_config(folders[name], "int8")) for name in names]
    assert len({shard.transforms_fingerprint for shard in shards}) == len(names)


ORDINARY = ["llama", "qwen3", "gemma2", "gemma3", "opt", "phi", "mixtral", "cohere", "gpt_neox"]


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_get_no_scale(name, tmp_path, caplog):
    folder = make_model(name, tmp_path)
    with caplog.at_level(logging.INFO):
        shards = [Shard(tiny_config(folder, kv)) for kv in ("bf16", UNROTATED, "fp8")]
    assert len({shard.transforms_fingerprint for shard in shards}) == 1  # bf16 is never scaled
    assert "divided" not in caplog.text


def test_models_of_a_short_context_are_measured_within_it(tmp_path):
    folder = make_model("opt", tmp_path, max_position_embeddings=32)
    assert Shard(tiny_config(folder, "int8")).info.max_model_tokens == 32


def test_the_log_says_once_what_was_scaled_and_that_fp8_has_no_calibration(folders, caplog):
    with caplog.at_level(logging.INFO), Ranks(tiny_config(folders["heads apart"], "fp8", tp=2)):
        pass
    said = [record.getMessage() for record in caplog.records if record.name.endswith("magnitudes")]
    assert said == [
        "K of layers 0, 1 is stored divided by 2^0 to 2^12: it is outside its format's range",
        "V of layers 0, 1 is stored divided by 2^-12 to 2^16: it is outside its format's range",
        "fp8 is stored without a calibration: a head's scale is 1, or a power of two where its magnitude "
        "for a test prompt requires it",
    ]


def test_keys_that_are_not_finite_are_said_and_get_no_scale(tmp_path, caplog):
    folder = make_model("llama", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        shard = Shard(tiny_config(folder, UNROTATED))
    assert "keys or values of layers 1 are not finite" in caplog.text
    assert shard.transforms_fingerprint == Shard(tiny_config(folder, "bf16")).transforms_fingerprint


@pytest.mark.parametrize(
    ("kv", "rms", "exponent"),
    [
        ("fp8", 1.0, 0),
        ("fp8", 2.0**-4, 0),
        ("fp8", 2.0**-4.1, -4),
        ("fp8", 2.0**4.1, 4),
        ("fp8", 2.0**-21.9, -20),
        ("int8", 2.0**-6, 0),
        ("int8", 2.0**6.1, 8),
        ("int4", 2.0**-13, -12),
        ("bf16", 2.0**-40, 0),
        ("fp32", 2.0**40, 0),
        ("int8", 0.0, 0),
        ("int8", math.inf, 0),
        ("fp8", math.nan, 0),
    ],
)
def test_a_scale_is_a_power_of_sixteen_outside_the_formats_range_and_else_none(kv, rms, exponent):
    assert static_exponent(rms**2, SIDES[kv]) == exponent

"""What generation_config.json recommends, and what of it can be used."""

import json
import logging

import pytest

from quire.replicas.errors import ModelNotServable
from quire.replicas.model.generation_defaults import generation_defaults
from quire.replicas.request import ResolvedSampling


def _said(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    return generation_defaults(folder)


def test_without_the_file_a_model_is_greedy(tmp_path):
    assert generation_defaults(tmp_path) == ResolvedSampling()


def test_what_it_recommends_is_the_default(tmp_path):
    said = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.05}
    others = {"eos_token_id": 2, "max_new_tokens": 9, "num_beams": 4}
    assert _said(tmp_path, do_sample=True, **said, **others) == ResolvedSampling(**said)


@pytest.mark.parametrize("do_sample", [{"do_sample": False}, {}])
def test_without_do_sample_it_is_greedy_whatever_the_temperature(tmp_path, do_sample):
    assert _said(tmp_path, temperature=0.6, top_p=0.9, **do_sample) == ResolvedSampling(top_p=0.9)


def test_do_sample_alone_draws_as_transformers_does(tmp_path):
    assert _said(tmp_path, do_sample=True, temperature=None) == ResolvedSampling(temperature=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -1), ("temperature", "warm"), ("top_p", 2), ("top_k", 1.5), ("min_p", True)],
)
def test_a_value_that_cannot_be_is_left_out_with_a_warning(tmp_path, caplog, name, value):
    with caplog.at_level(logging.WARNING):
        found = _said(
            tmp_path, do_sample=True, repetition_penalty=1.1, **({"temperature": 0.5} | {name: value})
        )
    expected = {"temperature": 0.5, "repetition_penalty": 1.1}
    expected.pop(name, None)
    assert found == ResolvedSampling(**expected)
    assert name in caplog.text
    assert "generation_config.json" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", '"x"', b"\xff"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "generation_config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelNotServable, match=r"generation_config\.json"):
        generation_defaults(tmp_path)

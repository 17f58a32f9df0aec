"""A calibration end to end on the demo model: read, interrupted, continued, served."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from recall import story

from quire.replicas import LLM, EngineConfig, SamplingParams
from quire.replicas.errors import ConfigError
from quire.replicas.precision.calibrate import CalibrationText, calibrate, read_texts

GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> CalibrationText:
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text(story(random.Random(0), 60))
    return read_texts("demo", [file, file], tokens=600, chunk_tokens=128)


def test_texts_are_read_in_equal_shares_and_chunks(text: CalibrationText) -> None:
    assert [len(chunk) for chunk in text.chunks] == [128, 128, 44] * 2
    assert text.chunks[:3] == text.chunks[3:]


def test_texts_that_say_too_little_or_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A fox.")
    with pytest.raises(ConfigError, match=r"a calibration needs 256"):
        read_texts("demo", [tmp_path / "short.txt"], tokens=600, chunk_tokens=128)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="binary cannot be read as UTF-8 text"):
        read_texts("demo", [tmp_path / "binary"], tokens=600, chunk_tokens=128)


@pytest.mark.parametrize("tp", [1, 2])
def test_an_interrupted_calibration_continues_and_ends_with_the_same_policy(
    text: CalibrationText, tp: int, tmp_path: Path
) -> None:
    config = EngineConfig(model="demo", kv="int4", tp=tp)
    calibrate(config, text, tmp_path / "whole")

    class Stop(Exception):
        pass

    told: list[int] = []

    def stop(done: int, total: int) -> None:
        told.append(done)
        if len(told) == 4:
            raise Stop

    with pytest.raises(Stop):
        calibrate(config, text, tmp_path / "parts", stop)
    calibrate(config, text, tmp_path / "parts", lambda done, total: told.append(done))
    for name in ("policy.json", "transforms.safetensors"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(f.name for f in (tmp_path / "parts").iterdir()) == ["policy.json", "transforms.safetensors"]


def test_a_calibrated_policy_serves_and_its_hits_equal_its_misses(text, tmp_path) -> None:
    calibrate(EngineConfig(model="demo", kv="int4"), text, tmp_path)
    prompt = [t for chunk in text.chunks[:2] for t in chunk]
    with LLM("demo", kv=str(tmp_path)) as llm:
        assert set(llm.info.kv_formats) == {("int4", "int4")}
        miss, hit = (llm.generate([prompt], GREEDY)[0] for _ in range(2))
    assert (miss.usage.cached_tokens, hit.usage.cached_tokens > 0) == (0, True)
    assert miss.outputs == hit.outputs

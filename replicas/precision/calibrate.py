"""Calibration: from a model and texts to a policy whose keys are shifted and scaled to lose the least.

Texts are cut into chunks, which are computed one by one. After each, the sums so far are kept beside the
policy, so that an interrupted calibration continues where it stopped. Memory does not grow with the texts.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from quire.replicas.config import EngineConfig, PoolConfig, SchedulerConfig
from quire.replicas.engine.load import load_tokenizer
from quire.replicas.errors import ConfigError
from quire.replicas.model.calibration import calibrated_formats, calibrated_tensors
from quire.replicas.model.policy import open_policy, save_policy
from quire.replicas.runner.executor import Executor

_LOG = logging.getLogger(__name__)

_PARTIAL = "partial.safetensors"
_LEAST_TOKENS = 256
"""Fewer say too little of a channel's mean and deviation."""


@dataclass(frozen=True, slots=True)
class CalibrationText:
    """Token ids of the texts in chunks, and a digest of them."""

    chunks: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.chunks))

    @property
    def digest(self) -> str:
        return hashlib.blake2b(repr(self.chunks).encode(), digest_size=16).hexdigest()


def read_texts(model: str, files: Sequence[Path], *, tokens: int, chunk_tokens: int) -> CalibrationText:
    """About `tokens` tokens of the files, an equal share of each, in chunks of `chunk_tokens`.

    Raises ConfigError for a file that cannot be read, too short texts, and a model without a tokenizer.
    """
    tokenizer = load_tokenizer(model)
    if tokenizer is None:
        raise ConfigError(f"{model} has no tokenizer to read texts with; calibrate a folder that has one")
    share = -(-tokens // len(files))
    chunks: list[tuple[int, ...]] = []
    for file in files:
        try:
            text = file.read_text(errors="strict")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read as UTF-8 text: {error}") from error
        ids = tokenizer(text[: 16 * share], verbose=False)["input_ids"][:share]
        chunks += [tuple(ids[at : at + chunk_tokens]) for at in range(0, len(ids), chunk_tokens)]
    found = CalibrationText(tuple(chunks))
    if found.tokens < _LEAST_TOKENS:
        raise ConfigError(
            f"the texts have {found.tokens} tokens; a calibration needs {_LEAST_TOKENS}, better some thousand"
        )
    return found


def calibrate(
    config: EngineConfig,
    text: CalibrationText,
    folder: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Calibrate the keys of `config.kv` on a text, and write the policy to `folder`.

    `config` says what model, which formats, and how many shards on what device compute it. `progress` is told
    (tokens done, tokens in all). Raises UnknownModel, ModelNotServable, ConfigError, ReplicaDied.
    """
    longest = max(map(len, text.chunks))
    small = replace(
        config,
        pool=PoolConfig(bytes=64 << 20, page_tokens=config.pool.page_tokens),
        scheduler=SchedulerConfig(max_running=1),
        max_model_tokens=max(longest, 2),
    )
    executor = Executor(small)
    try:
        shard = executor.shard
        weights = shard.weights_fingerprint.hex()
        sums = _Sums(folder / _PARTIAL, f"{weights} {text.digest}")
        for number, chunk in enumerate(text.chunks):
            if number >= sums.chunks:
                sums.add(executor.key_moments(chunk))
            progress(sum(map(len, text.chunks[: number + 1])), text.tokens)
        assert sums.total is not None
        specs = shard.specs
    finally:
        executor.close()
    layers = range(len(specs))
    formats = calibrated_formats(open_policy(config.kv, len(specs)).formats, layers)
    affine = [i for i in layers if formats[i].k.transform.affine]
    tensors = calibrated_tensors(affine, sums.total, text.tokens, specs)
    save_policy(folder, formats, tensors, weights, {"tokens": text.tokens, "text": text.digest})
    (folder / _PARTIAL).unlink(missing_ok=True)


class _Sums:
    """Moments over the chunks so far, kept in a file that only the same weights and texts go on from."""

    def __init__(self, file: Path, name: str) -> None:
        self._file, self._name = file, name
        self.chunks = 0
        self.total: Tensor | None = None
        try:
            with safe_open(file, "pt") as kept:
                if (kept.metadata() or {}).get("of") == name:
                    self.total = kept.get_tensor("sums")
                    self.chunks = int(kept.get_tensor("chunks"))
                    _LOG.info("continuing after the %d chunks in %s", self.chunks, file)
        except (OSError, SafetensorError):
            return

    def add(self, sums_L3HD: Tensor) -> None:
        self.total = sums_L3HD if self.total is None else self.total + sums_L3HD
        self.chunks += 1
        self._file.parent.mkdir(parents=True, exist_ok=True)
        written = self._file.with_suffix(".new")
        tensors = {"sums": self.total.contiguous(), "chunks": torch.tensor(self.chunks)}
        save_file(tensors, written, metadata={"of": self._name})
        written.replace(self._file)

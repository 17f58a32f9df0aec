"""A model's files on disk: where they are, which tensors they hold, and reading parts of those.

Knows nothing of modules or shards: names, shapes, index ranges.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from quire.replicas.errors import ModelNotServable, UnknownModel

_WANTED = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
"""Files of a hub repository: configuration, weights, tokenizer. No pickles, no code."""


def find_model(source: str) -> Path:
    """The folder of a model: "demo", a local folder, or a Hugging Face hub id (downloaded on first use).

    Raises: UnknownModel.
    """
    if source == "demo":
        return Path(__file__).parent.parent / "demo_model"
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnknownModel(f"{folder} holds no config.json; give a folder in Hugging Face format")
        return folder
    try:
        return Path(snapshot_download(source, allow_patterns=_WANTED))
    except (HFValidationError, OSError) as error:  # OSError: all that HTTP, network and cache raise
        raise UnknownModel(
            f'model {source!r} is neither a local folder nor "demo", and the Hugging Face hub did not give '
            "it: "
            f"{str(error).splitlines()[0]}"
        ) from error


def load_config(folder: Path) -> PreTrainedConfig:
    """The model's configuration. Raises ModelNotServable where transformers cannot read it."""
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, KeyError, OSError, StrictDataclassError) as error:
        raise ModelNotServable(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    return config


def eos_token_ids(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """Tokens that end an output: those of generation_config.json, else of config.json."""
    ids: Any = config.eos_token_id
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
        ids = generation.eos_token_id if generation.eos_token_id is not None else ids
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


class WeightSource(Protocol):
    """Where loading finds a whole model's tensors, by the names that checkpoints use."""

    @property
    def folder(self) -> Path:
        """The model's folder, for messages."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """The tensor's part at `index` (all of it by default), on any device and in any type."""

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that differ when the model or its weights differ."""


def config_digest(folder: Path) -> hashlib.blake2b:
    """A digest of 32 bytes, begun with what config.json says."""
    config = json.loads((folder / "config.json").read_text())
    return hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=32)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of all safetensors files of a folder. A context: files stay open inside it."""

    folder: Path
    slices: Mapping[str, Any]
    """Tensor name → safetensors slice, which reads only the asked part."""
    files: ExitStack

    @staticmethod
    def open(folder: Path) -> Checkpoint:
        """Raises ModelNotServable for missing, damaged or incomplete files."""
        files = ExitStack()
        slices: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                handle = files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelNotServable(
                    f"{path} is damaged or incomplete ({error}); copy or download it again"
                ) from error
            slices |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return Checkpoint(folder, slices, files)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.files.close()

    def __contains__(self, name: str) -> bool:
        return name in self.slices

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slices[name].get_shape())

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """The tensor's part at `index` (all of it by default), on the CPU in the checkpoint's type."""
        part: Tensor = self.slices[name][index or (slice(None),) * len(self.shape(name)) or ...]
        return part

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes that differ when the model or its weights differ; reads a sample of every tensor.

        The sample is the first 64 numbers along the last axis at three places: enough to tell one training
        run's checkpoints apart without reading every byte at every start.
        """
        digest = config_digest(self.folder)
        for name in sorted(self.slices):
            shape = self.shape(name)
            digest.update(f"{name} {shape} {self.slices[name].get_dtype()}".encode())
            for place in (0.0, 0.5, 1.0):
                at = tuple(slice(i := int(place * (n - 1)), i + 1) for n in shape[:-1])
                sample = self.read(name, (*at, slice(0, 64))) if shape else self.read(name)
                digest.update(sample.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.digest()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        paths = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        paths = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelNotServable(
            f"{folder} lacks {', '.join(missing)}, which its index names; download it again"
        )
    if not paths:
        raise ModelNotServable(f"{folder} holds no *.safetensors; convert the weights with save_pretrained()")
    return paths

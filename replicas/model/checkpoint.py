"""A model's files on disk: finding them, listing their tensors, and reading parts of those.

Knows nothing of modules or shards: names, shapes, index ranges.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from quire.replicas.errors import ModelNotServable, UnknownModel

_LOG = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"

UNREADABLE = (ArithmeticError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""What transformers raises for model files with unexpected contents."""

_HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.model", "*.txt"]
"""Files of a hub repository: configuration, weights, tokenizer. No pickles, no code."""


def find_model(source: str) -> Path:
    """Find the folder of a model: "demo", a local folder, or a Hugging Face hub id (downloaded on first use).

    Raises: UnknownModel.
    """
    if source == "demo":
        return Path(__file__).parent.parent / "demo_model"
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnknownModel(f"{folder} holds no config.json; give a folder in Hugging Face format")
        return folder
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:  # no id of the hub looks like that
        raise UnknownModel(f"no such folder: {folder.absolute()}")
    try:
        return Path(snapshot_download(source, allow_patterns=_HUB_FILES))
    except RepositoryNotFoundError as error:  # a gated repository, too: it is one of its subclasses
        raise UnknownModel(
            f"the Hugging Face hub does not give {source!r} to you. If it is gated or private, accept its "
            f"terms at https://huggingface.co/{source} and set HF_TOKEN to a token that may read it"
        ) from error
    except (HFValidationError, OSError) as error:  # OSError: all that HTTP, network and cache raise
        raise UnknownModel(
            f"there is no folder {source!r} here, and it could not be downloaded from the Hugging Face hub: "
            f"{str(error).splitlines()[0]}"
        ) from error


def load_config(folder: Path) -> PreTrainedConfig:
    """Read the model's configuration. Raises ModelNotServable where transformers cannot."""
    read_json(folder / "config.json")
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (*UNREADABLE, StrictDataclassError) as error:
        said = str(error).strip().splitlines()[0]  # what follows is advice to install other versions
        raise ModelNotServable(f"transformers cannot read {folder / 'config.json'}: {said}") from error
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a model's JSON file. Raises ModelNotServable where it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:  # ValueError: JSON and UTF-8
        raise ModelNotServable(
            f"{path} is damaged or cannot be read ({error}); copy or download it again"
        ) from error
    if not isinstance(values, dict):
        raise ModelNotServable(f"{path} holds no JSON object; copy or download it again")
    return values


def generation_values(folder: Path) -> dict[str, Any]:
    """Read generation_config.json; empty without one. Raises ModelNotServable for a damaged one."""
    path = folder / GENERATION_CONFIG
    return read_json(path) if os.path.lexists(path) else {}  # a broken link counts as damage


def eos_token_ids(folder: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """Return the tokens that end an output: those of generation_config.json, else of config.json.

    What is not in the model's vocabulary is left out, with a warning.
    """
    named = generation_values(folder).get("eos_token_id")
    tokens = _usable_tokens(named, folder / GENERATION_CONFIG, config.vocab_size)
    return tokens or _usable_tokens(config.eos_token_id, folder / "config.json", config.vocab_size)


def _usable_tokens(said: Any, file: Path, vocab_size: int) -> tuple[int, ...]:
    if said is None:
        return ()
    given = said if isinstance(said, list | tuple) else [said]
    tokens = [t for t in given if type(t) is int and 0 <= t < vocab_size]
    if len(tokens) < len(given):
        _LOG.warning(
            "%s: eos_token_id is %s, of which %s are used: the others are not in the vocabulary of %d",
            file,
            said,
            tokens or "none",
            vocab_size,
        )
    return tuple(tokens)


_MAX_NAME_BYTES = 255
"""The longest file name on common file systems."""


class WeightSource(Protocol):
    """A whole model's tensors, by name."""

    @property
    def folder(self) -> Path:
        """The model's folder, for messages."""

    def __contains__(self, name: str) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """Read the tensor's part at `index` (all of it by default), on any device and in any type."""

    @property
    def fingerprint(self) -> bytes:
        """32 bytes that differ when the model or its weights differ."""


def config_digest(folder: Path) -> hashlib.blake2b:
    """Start a digest of 32 bytes with the contents of config.json."""
    config = read_json(folder / "config.json")
    return hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=32)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder's safetensors files, by their names there.

    A context manager that keeps the files open.
    """

    folder: Path
    slices: Mapping[str, Any]
    """Tensor name → safetensors slice, which reads only the requested part."""
    files: ExitStack

    @staticmethod
    def open(folder: Path, named: object = None) -> Checkpoint:
        """Open the weights, from the file `named` by the config (`transformers_weights`), if any.

        Raises ModelNotServable for missing, damaged or incomplete files.
        """
        slices: dict[str, Any] = {}
        with ExitStack() as files:
            for path in _weight_files(folder, named):
                try:
                    handle = files.enter_context(safe_open(path, framework="pt"))
                except (SafetensorError, OSError) as error:
                    raise ModelNotServable(
                        f"{path} is damaged or incomplete ({error}); copy or download it again"
                    ) from error
                slices |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            return Checkpoint(folder, slices, files.pop_all())

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

    def dtype(self, name: str) -> torch.dtype:
        tensor = self.slices[name]
        none_of_it: Tensor = tensor[:0] if tensor.get_shape() else tensor[...]
        return none_of_it.dtype

    def read(self, name: str, index: tuple[slice, ...] = ()) -> Tensor:
        """Read the tensor's part at `index` (all of it by default), on the CPU in the checkpoint's type."""
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


def _weight_files(folder: Path, named: object) -> list[Path]:
    """List the files that transformers reads: the one that the config names (`transformers_weights`), else
    the one with the usual name, else those of the index.
    """
    if named is not None:
        first = _inside(folder, named, folder / "config.json")
    else:
        first = folder / SAFE_WEIGHTS_NAME
        if not first.is_file():
            first = folder / SAFE_WEIGHTS_INDEX_NAME
    if not first.is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        raise ModelNotServable(
            f"{folder} holds no {first.name if named else f'{SAFE_WEIGHTS_NAME} and no {first.name}'}"
            + (f" (transformers reads none of {', '.join(others)})" if others else "")
            + "; convert the weights with save_pretrained()"
        )
    if not first.name.endswith(".index.json"):
        return [first]
    files = read_json(first).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ModelNotServable(f"{first} holds no weight_map of tensors and files; download it again")
    paths = [_inside(folder, name, first) for name in sorted(set(map(str, files.values())))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ModelNotServable(
            f"{folder} lacks {', '.join(missing)}, which {first.name} names; download it again"
        )
    return paths


def _inside(folder: Path, name: object, said_by: Path) -> Path:
    """Resolve a file that another one names. Raises ModelNotServable for one outside the folder."""
    base, path = os.path.abspath(folder), os.path.abspath(folder / str(name))
    if os.path.commonpath([base, path]) != base:
        raise ModelNotServable(f"{said_by} names the file {name}, which is outside {folder}; correct it")
    if len(os.fsencode(str(name))) > _MAX_NAME_BYTES:
        raise ModelNotServable(f"{said_by} names a file of {len(str(name))} characters; correct it")
    return Path(path)

"""A KV policy: the format of every layer and, where it was calibrated, the static transforms.

`quire calibrate` writes a folder: `policy.json` (formats, and whose weights they are for) and
`transforms.safetensors` (fp32 `{layer}.{k or v}.{shift or scale}`, [kv heads, head_dim] of the whole model).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quire.kernels.formats import FORMATS, FormatError, LayerFormat, layer_formats, spelled
from quire.kernels.transform import default_transform
from quire.replicas.errors import ConfigError

_VERSION = 1
_JSON, _TENSORS = "policy.json", "transforms.safetensors"


@dataclass(frozen=True)
class KVPolicy:
    """The formats of a model's layers, and the transforms that a calibration found for them."""

    formats: tuple[LayerFormat, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    """Calibrated shifts and scales by name, as in the folder; none of a policy that needs no calibration."""
    weights: str = ""
    """The fingerprint of the weights that it was calibrated on; "" where nothing was."""

    def check(self, kv_heads: int, head_dim: int, weights: str) -> None:
        """Raise ConfigError if it was calibrated on other weights or for heads of another shape."""
        if self.tensors and weights != self.weights:
            raise ConfigError(
                f"kv: the policy was calibrated on other weights ({self.weights[:12]}) than this model's "
                f"({weights[:12]}); run `quire calibrate` on the model that is served"
            )
        for name, x in self.tensors.items():
            if tuple(x.shape) != (kv_heads, head_dim):
                raise ConfigError(
                    f"kv: the policy's {name} is for kv heads of {tuple(x.shape)}, the model has "
                    f"{(kv_heads, head_dim)}; run `quire calibrate` on the model that is served"
                )


def open_policy(kv: str | Mapping[str, object], num_layers: int) -> KVPolicy:
    """Open the policy that a configuration's `kv` means: a format's name, a mapping, a folder or a JSON file.

    Raises ConfigError for one that does not exist, cannot be read, or does not fit the number of layers.
    """
    try:
        if not isinstance(kv, str) or kv in FORMATS:
            return _complete(KVPolicy(layer_formats(kv, num_layers)))
        path = Path(kv)
        if not path.exists():
            if len(path.parts) > 1:
                raise FormatError(f"there is no KV policy at {kv}; run `quire calibrate` to make one")
            return KVPolicy(layer_formats(kv, num_layers))
        if path.is_file():
            return _complete(KVPolicy(layer_formats(_read_json(path), num_layers)))
        return _complete(_read_folder(path, num_layers))
    except FormatError as error:
        raise ConfigError(f"kv: {error}") from error


def _complete(policy: KVPolicy) -> KVPolicy:
    """Return the policy. Raises FormatError if a format needs a calibration that it does not have."""
    for i, fmt in enumerate(policy.formats):
        for name, side in (("k", fmt.k), ("v", fmt.v)):
            if f"{i}.{name}.scale" not in policy.tensors:
                default_transform(side)
    return policy


def save_policy(
    folder: Path,
    formats: Sequence[LayerFormat],
    tensors: Mapping[str, Tensor],
    weights: str,
    note: Mapping[str, object],
) -> None:
    """Write a calibrated policy. `note` says how it came about and is not read again."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: x.float().contiguous() for name, x in tensors.items()}, folder / _TENSORS)
    policy = {"version": _VERSION, "weights": weights, "formats": spelled(formats), "calibration": dict(note)}
    (folder / _JSON).write_text(json.dumps(policy, indent=1) + "\n")


def _read_folder(folder: Path, num_layers: int) -> KVPolicy:
    policy = _read_json(folder / _JSON)
    unknown = set(policy) - {"version", "weights", "formats", "calibration"}
    formats, weights = policy.get("formats"), policy.get("weights")
    if unknown or policy.get("version") != _VERSION or not isinstance(weights, str):
        raise FormatError(
            f"{folder / _JSON} is not a calibrated policy of version {_VERSION}; run `quire calibrate` again"
        )
    if not isinstance(formats, Mapping):
        raise FormatError(f'"formats" of {folder / _JSON} is a mapping of "default" and "layers"')
    try:
        tensors = load_file(folder / _TENSORS)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{folder / _TENSORS} cannot be read: {error}") from error
    for name, x in tensors.items():
        positive = not name.endswith(".scale") or bool((x > 0).all())
        if x.dtype != torch.float32 or not bool(x.isfinite().all()) or not positive:
            raise FormatError(
                f"{name} in {folder / _TENSORS} must be finite fp32 numbers, scales above 0; "
                "the file is damaged"
            )
    return KVPolicy(layer_formats(formats, num_layers), tensors, weights)


def _read_json(path: Path) -> Mapping[str, object]:
    try:
        policy = json.loads(path.read_text())
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error
    if not isinstance(policy, dict):
        raise FormatError(f'{path} must hold a mapping such as {{"default": {{"k": "int8", "v": "int4"}}}}')
    return policy

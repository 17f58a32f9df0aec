"""The demo model with slightly other weights: what an upgrade brings."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from quire.replicas.model.checkpoint import find_model


def reweighed(into: Path, by: float = 0.98) -> Path:
    """A folder below `into` with the model, every weight times `by`."""
    folder = Path(shutil.copytree(find_model("demo"), into / f"demo-times-{by:g}"))
    file = folder / "model.safetensors"
    save_file({name: tensor * by for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder

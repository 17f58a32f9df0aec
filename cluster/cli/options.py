"""Options that several commands of `quire` share, and the type of `--replicas`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from quire.cluster.api.client import DEFAULT_ADDRESS
from quire.kernels.formats import FORMATS
from quire.replicas.errors import ConfigError

APP = "quire"

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)


class Replicas(click.ParamType[dict[str, Any]]):
    """Turns `3` or `1..4` into keys of the `replicas` branch of the configuration."""

    name = "number or LEAST..MOST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        found = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", str(value))
        if found is None:
            self.fail(f"{value!r} is neither a number nor LEAST..MOST, such as 1..4", param, ctx)
        least, most = found.groups()
        return {"autoscaling": {"min": int(least), "max": int(most)}} if most else {"count": int(least)}


def compose(*decorators: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


class Policy(click.ParamType[str | dict[str, object]]):
    """Turns what `--kv` takes into the `kv` of the configuration, as another machine can read it."""

    name = "format, file or folder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if value in FORMATS:
            return value
        if path.is_dir():
            return str(path.resolve())
        if not path.is_file():
            return value
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error


kv_option = click.option(
    "--kv",
    type=Policy(),
    help="KV format (bf16, fp8, int8, int4, k8v4, ...), a JSON file with one for each layer and side, or a "
    "folder from `quire calibrate`.  [default: int8]",
)
cluster_options = compose(
    click.option(
        "--ray-address",
        default="auto",
        show_default=True,
        envvar="RAY_ADDRESS",
        help="The address of the Ray cluster (RAY_ADDRESS).",
    ),
    click.option("--app", default=APP, show_default=True, help="The application's name in Ray Serve."),
)
address_option = click.option(
    "--address",
    default=DEFAULT_ADDRESS,
    show_default=True,
    envvar="QUIRE_ADDRESS",
    help="The gateway, host:port, or several with commas (QUIRE_ADDRESS).",
)
sampling_options = compose(
    click.option("--max-tokens", default=256, show_default=True, help="Most tokens of an answer."),
    click.option("--temperature", type=float, help="0 is greedy.  [default: the model's]"),
    click.option(
        "--top-p",
        type=float,
        help="Keep the most probable tokens up to this sum.  [default: the model's]",
    ),
    click.option("--seed", type=int, help="The same seed gives the same answer, which can be resumed."),
    click.option("--stop", multiple=True, help="End the answer before this text; may be repeated."),
    click.option("--deadline", type=float, help="Give up after this many seconds."),
)

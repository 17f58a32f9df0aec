"""The `quire` command: its group, its exit codes, and the only file that reads environment variables.

Exit codes: 0 done, 1 it cannot be done (one line on stderr says why), 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from quire.cluster.cli import client_commands, precision_commands, serve_commands
from quire.kernels.formats import FormatError
from quire.replicas.errors import QuireError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": "QUIRE"})
def cli() -> None:
    """Serve language models with a quantized, shared KV cache.

    Every option can be set by a variable as well: QUIRE_SERVE_PORT=9000 is `quire serve --port 9000`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


for module in (serve_commands, precision_commands, client_commands):
    for command in module.COMMANDS:
        cli.add_command(command)


def main() -> None:
    """Run the command: errors meant for people become one line and an exit code."""
    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (QuireError, FormatError) as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        if str(error.name).startswith("quire"):
            raise
        _fail(f"this needs more than a client ({error.name} is missing): pip install 'quire[serve]'")
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)


def _fail(reason: str) -> NoReturn:
    click.echo(f"quire: {reason}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()

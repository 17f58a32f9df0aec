"""The loopback as a link: of a given speed, with its bytes counted.

Wants the namespace of scripts/loopback, where nothing else uses it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def shaped(mbit: int) -> Iterator[None]:
    """Limit both directions together to a rate in Mb/s (tbf)."""
    burst = max(mbit * 125, 128 << 10)  # a millisecond, but two of its largest packets at least
    rule = ["rate", f"{mbit}mbit", "burst", str(burst), "limit", str(64 << 20)]
    subprocess.run(["tc", "qdisc", "add", "dev", "lo", "root", "tbf", *rule], check=True)
    try:
        yield
    finally:
        subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)


def received_bytes() -> int:
    """Since its start, TCP and IP headers and acknowledgements included."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    raise OSError("/proc/net/dev names no loopback interface")

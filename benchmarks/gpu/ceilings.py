"""What the card at hand can do at most: every figure of the other benchmarks is a share of these.

python -m benchmarks.gpu.ceilings
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.gpu.timing import call_seconds
from benchmarks.rows import Row

_COPY_BYTES = 4 << 30
_MATMUL = 8192


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured on this device, in this process."""

    copy_bytes_s: float
    """Bytes read plus bytes written by a device-to-device copy, a second."""
    matmul_flop_s: float
    """bf16 matrix product of random numbers."""

    @classmethod
    def measure(cls) -> Ceilings:
        source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        copy_s = call_seconds(lambda: target.copy_(source))
        a, b = torch.randn(2, _MATMUL, _MATMUL, dtype=torch.bfloat16, device="cuda")
        matmul_s = call_seconds(lambda: a @ b)
        return cls(2 * _COPY_BYTES / copy_s, 2 * _MATMUL**3 / matmul_s)

    def rows(self) -> list[Row]:
        return [
            Row("ceiling device copy", "bandwidth", self.copy_bytes_s / 1e9, "GB/s", "itself", 1.0),
            Row("ceiling bf16 matmul", "rate", self.matmul_flop_s / 1e12, "TFLOP/s", "itself", 1.0),
        ]


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), Ceilings.measure())

"""All benchmarks on the GPU at hand, kernels to engine: one line per case, rows kept, regressions named.

    python -m benchmarks.gpu [attention|write|prefill|layout|model|startup|links ...] --date 2026-01-31

Rows go to `benchmarks/results/<gpu>-<date>.json` (--results names another folder). With --compare, they are
compared with the card's newest ones of the same case and an earlier date; anything more than 15 % worse ends
in status 1.
Run `pytest tests/gpu` first: figures of wrong kernels are worthless.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from benchmarks.gpu import attention, layout, links, prefill, results, startup, whole_model, write
from benchmarks.gpu.ceilings import Ceilings
from benchmarks.rows import Row

PARTS: Mapping[str, Callable[[Ceilings], Iterable[Row]]] = {
    "attention": attention.measure,
    "write": write.measure,
    "prefill": prefill.measure,
    "layout": layout.measure,
    "model": whole_model.measure,
    "startup": startup.measure,
    "links": links.measure,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument("--date", required=True, help="names the results' file")
    parser.add_argument("--results", type=Path, default=results.RESULTS)
    parser.add_argument("--compare", action="store_true", help="with the last results of this card")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}; choose of {', '.join(PARTS)}")
    device = torch.cuda.get_device_name()
    file = results.file_for(device, args.date, args.results)
    ceilings = Ceilings.measure()
    print(
        f"{device}, torch {torch.__version__}: copy {ceilings.copy_bytes_s / 1e9:.0f} GB/s, "
        f"bf16 matmul {ceilings.matmul_flop_s / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    rows = ceilings.rows()
    results.save(rows, file)
    for part in args.parts or PARTS:
        for row in PARTS[part](ceilings):
            rows.append(row)
            results.save(rows, file)  # each at once: what a run that breaks off has measured stays
    if not args.compare:
        return 0
    before = results.rows_before(file)
    worse = results.regressions(rows, before)
    print(*worse or ["nothing is more than 15 % worse"], sep="\n")
    print(f"compared with {len(before)} rows of earlier dates")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())

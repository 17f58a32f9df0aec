"""Draws standard input as a terminal: `quire top --once | python scripts/terminal_svg.py > top.svg`.

Sizes are in pixels.
"""

import sys
from html import escape

_CHARACTER, _LINE, _MARGIN = 7.83, 19, 16
_STYLE = "text { font: 13px ui-monospace, Menlo, Consolas, monospace; fill: #d8dee9; white-space: pre }"


def svg(text: str) -> str:
    lines = text.rstrip("\n").splitlines()
    width = round(2 * _MARGIN + _CHARACTER * max(map(len, lines)))
    height = 2 * _MARGIN + _LINE * len(lines)
    rows = [_row(at, line) for at, line in enumerate(lines) if line]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}">',
            f"<style>{_STYLE}</style>",
            '<rect width="100%" height="100%" rx="8" fill="#20242c"/>',
            *rows,
            "</svg>\n",
        ]
    )


def _row(at: int, line: str) -> str:
    y, length = _MARGIN + _LINE * (at + 0.75), _CHARACTER * len(line)
    return f'<text x="{_MARGIN}" y="{y:.0f}" textLength="{length:.0f}">{escape(line)}</text>'


if __name__ == "__main__":
    print(svg(sys.stdin.read()), end="")

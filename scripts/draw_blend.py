"""Draw docs/assets/blend.svg: two prompts that share texts, and what a plan computes of the second.

python scripts/draw_blend.py
"""

from __future__ import annotations

import sys
from pathlib import Path

TARGET = Path(__file__).parent.parent / "docs" / "assets" / "blend.svg"

WIDTH, BAR, LEFT = 860, 34, 150
SCALE = (WIDTH - LEFT - 20) / 1500
COLOURS = {
    "exact": "#4c956c",
    "reused": "#8ecae6",
    "computed": "#f4a259",
}
TEXTS = {"head": 120, "A": 300, "B": 400, "C": 320, "question": 160, "other": 180}

Part = tuple[str, str, int]
"""What is written on a part of a prompt, how it comes to be, and its tokens."""

FIRST: list[Part] = [
    ("head", "computed", TEXTS["head"]),
    ("A", "computed", TEXTS["A"]),
    ("B", "computed", TEXTS["B"]),
    ("C", "computed", TEXTS["C"]),
    ("question", "computed", TEXTS["question"]),
]


def edges(name: str, count: int) -> list[Part]:
    """A reused text of which the plan `edges` computes both ends."""
    begin, end = round(count * 0.13), round(count * 0.02)
    return [
        ("", "computed", begin),
        (name, "reused", count - begin - end),
        ("", "computed", end),
    ]


SECOND: list[Part] = [
    ("head", "exact", TEXTS["head"]),
    *edges("C", TEXTS["C"]),
    *edges("A", TEXTS["A"]),
    *edges("B", TEXTS["B"]),
    ("question", "computed", TEXTS["other"]),
]


def bar(parts: list[Part], top: int, label: str) -> list[str]:
    """One prompt."""
    drawn = [f'<text x="{LEFT - 14}" y="{top + 22}" text-anchor="end">{label}</text>']
    at = float(LEFT)
    for name, kind, count in parts:
        width = count * SCALE
        drawn.append(
            f'<rect x="{at:.1f}" y="{top}" width="{width:.1f}" height="{BAR}" '
            f'fill="{COLOURS[kind]}" stroke="#ffffff"/>'
        )
        if name:
            drawn.append(
                f'<text x="{at + width / 2:.1f}" y="{top + 22}" text-anchor="middle" '
                f'fill="#1d1d1f">{name}</text>'
            )
        at += width
    return drawn


def legend(top: int) -> list[str]:
    words = {
        "exact": "loaded, exact",
        "reused": "loaded, turned to its place",
        "computed": "computed",
    }
    drawn, at = [], LEFT
    for kind, text in words.items():
        drawn.append(f'<rect x="{at}" y="{top}" width="16" height="16" fill="{COLOURS[kind]}"/>')
        drawn.append(f'<text x="{at + 24}" y="{top + 13}">{text}</text>')
        at += 70 + 8 * len(text)
    return drawn


def picture() -> str:
    """The whole of it."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 176" '
        'font-family="system-ui, sans-serif" font-size="14" fill="#6e6e73">',
        *bar(FIRST, 10, "first prompt"),
        *bar(SECOND, 74, "another order"),
        *legend(138),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TARGET.write_text(picture(), encoding="utf-8")
    sys.exit(0)

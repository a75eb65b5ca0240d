"""The damage that an operator puts up with, as a text: ``kl <= 0.01 and agreement >= 98%``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# What it is called, the field of a table's row, and whether more of it is worse.
METRICS: Mapping[str, tuple[str, bool]] = {
    "kl": ("kl_mean", True),
    "kl_p99": ("kl_p99", True),
    "perplexity": ("perplexity", True),
    "agreement": ("agreement", False),
    "retrieval": ("retrieval", False),
    "rules": ("rules", False),
}

_TERM = re.compile(r"\s*([a-z_0-9]+)\s*(<=|>=)\s*([0-9.]+(?:e-?[0-9]+)?)\s*(%?)\s*")


@dataclass(frozen=True)
class Bound:
    """Limits on the scores of a codec or a plan of blending, all of which it has to keep.

    Args:
        limits: metric and limit; of perplexity the increase, so 0.01 is one percent.
    """

    limits: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Read a bound; ``str`` gives it back.

        Raises:
            ValueError: an unknown metric, a limit on the wrong side, or no number.
        """
        limits = []
        for term in text.split(" and "):
            found = _TERM.fullmatch(term)
            if found is None:
                raise ValueError(f"{term.strip()!r} is not a metric, <= or >=, and a number")
            metric, sign, number, percent = found.groups()
            if metric not in METRICS:
                raise ValueError(f"{metric!r} is not measured; there are {', '.join(METRICS)}")
            wanted = "<=" if METRICS[metric][1] else ">="
            if sign != wanted:
                raise ValueError(f"{metric} is bounded by {wanted}")
            try:
                limits.append((metric, float(number) / (100 if percent else 1)))
            except ValueError:
                raise ValueError(f"{number!r} is not a number") from None
        return cls(tuple(limits))

    def __str__(self) -> str:
        return " and ".join(
            f"{metric} {'<=' if METRICS[metric][1] else '>='} {limit:.9g}"
            for metric, limit in self.limits
        )

    def meets(self, scores: object) -> bool:
        """Whether a codec, or a plan, keeps every limit, by the worse end of its 95% interval.

        What was not measured (retrieval, where the exact cache finds nothing) is not kept.

        Args:
            scores: `kvstrata.quality.table.Scores`, or a row of the table of blending.
        """
        for metric, limit in self.limits:
            field, more_is_worse = METRICS[metric]
            estimate = getattr(scores, field, None)
            if estimate is None:
                return False
            if estimate.high > limit if more_is_worse else estimate.low < limit:
                return False
        return True

"""What a warm answer costs while others run, and what KVStrata costs those it cannot help."""

from __future__ import annotations

import sys

from benchmarks.common import Options, Row, main
from benchmarks.under_load import attached, encoding, warm


def measure(options: Options) -> list[Row]:
    """All rows of this benchmark; each part is a program of its own, too."""
    return warm.measure(options) + attached.measure(options) + encoding.measure(options)


if __name__ == "__main__":
    sys.exit(main(measure, __doc__))

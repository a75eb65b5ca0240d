"""``python -m benchmarks.codecs`` is ``python -m benchmarks.codecs.run``."""

from __future__ import annotations

import sys

from benchmarks.codecs.run import measure
from benchmarks.common import main

sys.exit(main(measure, "How fast every codec is on one core, and how much smaller it makes KV."))

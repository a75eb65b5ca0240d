"""SGLang's connector moves tensors, and needs torch where it needs no SGLang."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["test_*.py"]

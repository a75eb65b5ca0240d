"""Which namespace a model's KV belongs to: its weights as they lie in memory, and how it computes.

A model in Python may have been changed since it was loaded, or never have been loaded at all. So
its own tensors are hashed, wherever they came from, and not the files that its configuration names.
"""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from blake3 import blake3

from kvstrata.connectors.identity import from_anywhere
from kvstrata.connectors.transformers.kinds import Kinds
from kvstrata.connectors.transformers.witness import settings
from kvstrata.errors import ConfigError
from kvstrata.identity import model_fingerprint
from kvstrata.keys import Namespace, length_prefixed
from kvstrata.wire.namespaces import MAX_DETAIL_CHARS

_PIECE_BYTES = 64 << 20
_LIBRARIES = ("torch.", "transformers.")
_HOW = ("_attn_implementation", "_experts_implementation")


def own_namespace(model: Any, kinds: Kinds, tenant: str) -> tuple[Namespace, str]:
    """The namespace of what a model computes, and the identity of its weights; reads all of them.

    Args:
        model: that nobody changes meanwhile.
        kinds: of its layers.
        tenant: as configured.
    Raises:
        ConfigError: it cannot be identified, so nothing may be cached.
    """
    weights = weights_in_memory(model)
    namespace = Namespace(
        model=model_fingerprint(effective_of(model), weights),
        layout=kinds.layout,
        chunk_tokens=kinds.chunk_tokens,
        tenant=tenant,
    )
    return namespace, weights


def details(model: Any, namespace: Namespace, weights: str) -> dict[str, str]:
    """What a namespace's fingerprint is made of, in words, for an operator who compares two."""
    effective = effective_of(model)
    configuration = json.dumps(effective.pop("model"), sort_keys=True).encode()
    if not namespace.pages:  # what is shared is made of the checkpoint's own
        effective["configuration"] = blake3(configuration).hexdigest()[:16]
    told = {"name": str(model.name_or_path), "weights": weights, **effective}
    return {name: str(value)[-MAX_DETAIL_CHARS:] for name, value in told.items()}


def effective_of(model: Any) -> dict[str, Any]:
    """What a model computes with, beside its weights."""
    how = {name.strip("_"): str(getattr(model.config, name, None)) for name in _HOW}
    return {
        "engine": "transformers",
        "model": described(model.config),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "code": code_of(model),
        "settings": _settings_of(model),
        "dtype": str(model.dtype),
        "quantization": str(getattr(model.config, "quantization_config", None)),
        **how,
    }


def _settings_of(model: Any) -> str:
    """A hash of what modules have in attributes, which need not be in the configuration."""
    each = {name: settings(module) for name, module in model.named_modules()}
    return blake3(json.dumps(each, sort_keys=True).encode()).hexdigest()[:16]


def described(config: Any) -> Any:
    """A configuration, without what does not shape what is computed."""
    plain = config.to_dict()
    plain.pop("_name_or_path", None)
    plain.pop("transformers_version", None)
    # dtypes and enums have one text form each; nothing else in a configuration is an object
    return from_anywhere(json.loads(json.dumps(plain, default=str)))


@torch.no_grad()
def weights_in_memory(model: Any) -> str:
    """64 hex digits for the tensors of a model, by their names.

    A second for a few GB. Those that a model makes for itself, and would not save, are read too:
    ``model.to(torch.bfloat16)`` rounds the angles of a rotary embedding, and ``dtype`` does not.

    Raises:
        ConfigError: a tensor that cannot be read, since it lies on a disk or is of a class of its
            own.
    """
    hasher = blake3(max_threads=blake3.AUTO)
    named: dict[int, str] = {}
    tensors = {**dict(model.named_buffers()), **model.state_dict(keep_vars=True)}
    for name, value in sorted(tensors.items()):
        if not isinstance(value, torch.Tensor):
            hasher.update(length_prefixed(name) + length_prefixed(repr(value)))
            continue
        shape = f"{value.dtype} {tuple(value.shape)} {named.get(id(value), '')}"
        hasher.update(length_prefixed(name) + length_prefixed(shape))
        if id(value) in named:
            continue
        named[id(value)] = name
        try:
            flat = value.detach().contiguous().view(-1).view(torch.uint8)
            for piece in flat.split(_PIECE_BYTES):
                hasher.update(memoryview(piece.cpu().numpy()))
        except Exception as error:
            raise ConfigError("model", f"its tensor {name} cannot be read: {error}") from error
    if not named:
        raise ConfigError("model", "it has no weights")
    return hasher.hexdigest()


def code_of(model: Any) -> str:
    """A hash of the files whose code is no library's: it is no part of the weights.

    That of classes, and of functions that stand in the place of a class's or of one module's own.
    """
    classes = {base for module in model.modules() for base in type(module).__mro__} - {object}
    foreign: list[Any] = [one for one in classes if not _is_librarys(one.__module__)]
    for one in classes.difference(foreign):
        foreign += [value for value in vars(one).values() if _is_foreign(value)]
    for module in model.modules():
        own = vars(module)
        foreign += [own[name] for name in own if name != "generate" and _is_foreign(own[name])]
    files = set()
    for one in foreign:
        try:
            file = inspect.getsourcefile(one)
        except (OSError, TypeError):
            file = None
        if file is None and one.__module__ not in ("builtins", "abc", "typing"):
            raise ConfigError("model", f"the code of {one.__qualname__} is in no file")
        if file is not None:
            files.add(file)
    digests = sorted(blake3(Path(file).read_bytes()).hexdigest() for file in files)
    return blake3("\n".join(digests).encode()).hexdigest()[:16] if digests else ""


def _is_foreign(value: Any) -> bool:
    """Whether it is a function that somebody else has defined, whatever it calls itself."""
    function = getattr(value, "__func__", value)
    if not isinstance(function, FunctionType):
        return False
    where = str(function.__globals__.get("__name__", ""))
    return not _is_librarys(where) and where.split(".")[0] not in sys.stdlib_module_names


def _is_librarys(module: str) -> bool:
    return f"{module}.".startswith(_LIBRARIES)

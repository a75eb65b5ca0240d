"""Which module of a model holds which, noted as torch hears of it.

An engine that hands its model to nobody still hands out the model's layers, and from one of these
what holds it can be climbed to. vLLM calls `register` before it loads a model: it is an entry point
(``vllm.general_plugins``). It costs a microsecond or two for each module that is made, and nothing
of what is noted keeps a module alive. Modules are told apart by which they are: what they say of
their own equality or hash is not asked, since that may raise, in the middle of somebody's model.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any

_HOLDERS: dict[int, tuple[weakref.ref[Any], weakref.ref[Any]]] = {}
"""By the id of each module that is alive: it, and what holds it."""
_hooks: list[Any] = []


def register() -> None:
    """Note from now on which module holds which, in this process. Repeatable."""
    from torch.nn.modules.module import register_module_module_registration_hook

    if not _hooks:
        _hooks.append(register_module_module_registration_hook(_note))


def common_root(modules: Iterable[Any]) -> Any:
    """What holds all of these, directly or not, and is held by nothing; None: that is not known."""
    roots = {id(root): root for root in map(_root, modules)}
    return roots.popitem()[1] if len(roots) == 1 else None


def _root(module: Any) -> Any:
    passed = set()
    while id(module) not in passed:
        passed.add(id(module))
        noted = _HOLDERS.get(id(module))
        above = noted[1]() if noted is not None else None
        module = module if above is None else above
    return module


def _note(holder: Any, name: str, module: Any) -> None:
    with suppress(TypeError):  # none, or what cannot be referred to weakly
        gone = partial(_forget, id(module))
        _HOLDERS[id(module)] = weakref.ref(module, gone), weakref.ref(holder)


def _forget(number: int, module: weakref.ref[Any]) -> None:
    """A module is about to go, and its number may be another's soon."""
    noted = _HOLDERS.get(number)
    if noted is not None and noted[0] is module:
        del _HOLDERS[number]

"""Whether a model is still what it was: its modules, its tensors, and what hangs on them.

Numbers and texts in attributes of modules and of the configuration are compared.
torch counts what changes a tensor in place, so an optimizer's step and ``load_state_dict`` show, as
do modules that an adapter puts in the place of others. A change that goes around that count,
through ``tensor.data``, does not.
"""

from __future__ import annotations

from typing import Any

Witness = tuple[Any, ...]

_SIMPLE = (bool, int, float, str)


def witness(model: Any) -> Witness:
    """What would differ, had the model been changed; about a millisecond for a thousand tensors."""
    return (
        tuple(_module(module) for module in model.modules()),
        tuple(_tensor(one) for one in model.parameters()),
        tuple(_tensor(one) for one in model.buffers()),
        settings(model.config),
        settings(model.config.get_text_config(decoder=True)),
    )


def hooked(model: Any) -> str:
    """The class of a module that somebody else's hooks may change the output of; "" if none."""
    for module in model.modules():
        if any(_foreign(hook) for hook in _hooks(module)):
            return type(module).__name__
    return ""


def settings(thing: Any) -> list[tuple[str, Any]]:
    """The numbers and texts among an object's own attributes: a scale, a switch."""
    return [
        (name, value)
        for name, value in vars(thing).items()
        if type(value) in _SIMPLE and name != "training" and "name_or_path" not in name
    ]


def _module(module: Any) -> tuple[Any, ...]:
    hooks = sum(1 for hook in _hooks(module) if _foreign(hook))
    forward = id(vars(module).get("forward")), id(type(module).forward)
    return id(module), id(type(module)), hooks, forward, settings(module)


def _tensor(tensor: Any) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr(), tensor.dtype


def _hooks(module: Any) -> list[Any]:
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


def _foreign(hook: Any) -> bool:
    """transformers hooks its own modules, to collect what was asked for."""
    return not str(getattr(hook, "__module__", "")).startswith("transformers.")

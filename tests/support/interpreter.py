"""Triton's interpreter, without the half of its time that changes nothing of what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from triton import language
from triton.runtime import interpreter


def spare() -> None:
    """Leave out what is done again and again, or for nobody."""
    interpreter._patch_lang = _patched_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    # Without `debug`, what the check for overflows finds is thrown away.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


def _patched_once(patch: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``patch``, once for a launch and not again for every function that its kernel calls.

    What such a function's module needs beyond that is patched too, and restored with the launch.
    """
    launch: list[Any] = []
    modules: list[dict[str, Any]] = []  # whose functions find the language patched

    def restoring(restore: Callable[[], None]) -> Callable[[], None]:
        def restore_all() -> None:
            launch.clear()
            modules.clear()
            restore()

        return restore_all

    def patched(function: Any) -> Any:
        names = function.__globals__
        if any(names is known for known in modules):
            return launch[0]
        modules.append(names)
        scope = patch(function)
        # Of one element, but not of no dimension: numpy would refuse it as the end of a loop.
        scope.set_attr(language.tensor, "__index__", lambda self: self.handle.data.item())
        if launch:
            launch[0]._changes += scope._changes
        else:
            scope.restore = restoring(scope.restore)
            launch.append(scope)
        return launch[0]

    return patched


def _by_name(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """``find`` (numpy's dtype for one of Triton's), which makes a table of all for each call."""
    found: dict[str, Any] = {}

    def dtype(of: Any) -> Any:
        name = of.scalar.name
        if name not in found:
            found[name] = find(of)
        return found[name]

    return dtype

"""What our Triton kernels may refer to."""

import ast
import importlib
import inspect
import pkgutil
import textwrap
from types import FunctionType

import pytest

pytest.importorskip("triton")

import triton

import idlm.integrations.sglang
import idlm.model.cuda
import idlm.training

PACKAGES = (idlm.model.cuda, idlm.integrations.sglang, idlm.training)


def kernels() -> list[FunctionType]:
    """Every function of ours that Triton compiles."""
    found = {}
    for package in PACKAGES:
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            if "kernel" not in module.name and package is not idlm.model.cuda:
                continue
            for value in vars(importlib.import_module(module.name)).values():
                function = getattr(value, "fn", None)
                kernel = isinstance(value, triton.runtime.KernelInterface)
                if kernel and isinstance(function, FunctionType):
                    found[function.__module__, function.__name__] = function
    return list(found.values())


def test_kernels_call_the_language_alone() -> None:
    """Programs that we run inside replace functions of ``triton``; a kernel with one is refused."""
    found = kernels()
    assert len(found) > 20
    for function in found:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        body = next(x for x in tree.body if isinstance(x, ast.FunctionDef)).body
        names = {x.id for part in body for x in ast.walk(part) if isinstance(x, ast.Name)}
        assert "triton" not in names, f"{function.__module__}.{function.__name__}"

"""Regional torch.compile on CUDA: small functions, each compiled once per set of shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any

import torch

from idlm.model.decoder import Decoder, Layer

# Sets of shapes and adapters that one process may compile a function for (ablations have many).
MAX_VARIANTS = 64


@cache
def compiled(function: Callable[..., Any], backend: str = "inductor") -> Callable[..., Any]:
    """``function``, compiled for static shapes; the same object at every call."""
    torch._dynamo.config.recompile_limit = MAX_VARIANTS
    return torch.compile(function, dynamic=False, backend=backend)


def compile_layers(decoder: Decoder, backend: str = "inductor") -> None:
    """Compile the two halves of every layer: one compilation each, shared by all layers."""
    project, combine = compiled(Layer.project, backend), compiled(Layer.combine, backend)
    for layer in decoder.layers:
        # Attributes of the instance shadow the class's methods.
        vars(layer).update(project=MethodType(project, layer), combine=MethodType(combine, layer))

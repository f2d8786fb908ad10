"""SGLang's own layers with a LoRA on some rows: its product, or ours in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from torch import nn

from idlm.integrations.sglang import product as product_module
from idlm.integrations.sglang.product import Product
from idlm.integrations.sglang.rows import RowOrder
from idlm.model.adapter import LoraLinear

pytestmark = pytest.mark.sglang

HIDDEN = 96
ONE: dict[str, Any] = {"tp_rank": 0, "tp_size": 1}
# The layer, its inputs and its modules.
LAYERS: dict[str, tuple[Callable[[], Any], int, tuple[int, ...]]] = {
    "qkv": (lambda: QKVParallelLinear(HIDDEN, 16, 4, 2, bias=True, **ONE), HIDDEN, (64, 32, 32)),
    "gate_up": (
        lambda: MergedColumnParallelLinear(HIDDEN, [48, 48], bias=False, **ONE),
        HIDDEN,
        (48, 48),
    ),
    "down": (lambda: RowParallelLinear(48, HIDDEN, bias=False, **ONE), 48, (HIDDEN,)),
}


class Case:
    """A layer of the host, and what its product and the update come to."""

    def __init__(self, name: str, rows: int, masks: int, *, merge: bool) -> None:
        make, inputs, modules = LAYERS[name]
        self.layer, self.host = make(), make()
        self.lora = LoraLinear(inputs, modules, 5, scale=1.5)
        for parameter in (*self.layer.parameters(), *self.lora.parameters()):
            nn.init.normal_(parameter, std=0.3)
        self.host.load_state_dict(self.layer.state_dict())
        self.x_FI = torch.randn(rows, inputs)
        # Projection 1 of 2: nobody else's counter may be used up.
        self.order = RowOrder(torch.randperm(rows), masks, torch.zeros(2, 1, dtype=torch.int32))
        self.running: RowOrder | None = self.order
        self.product = Product(self.layer, self.lora, 1, merge=merge)
        self.layer.quant_method = self.product.method(lambda: self.running)

    def run(self, layer: Any) -> torch.Tensor:
        """What the host's layers call, without the sum over ranks."""
        y_FO: torch.Tensor = layer.quant_method.apply(layer, self.x_FI, bias=layer.bias)
        return y_FO

    def expected(self) -> torch.Tensor:
        y_FO, masks_M = self.run(self.host).double(), self.order.order_F[-self.order.masks :]
        down = F.linear(self.x_FI[masks_M].double(), self.lora.A.double()).split(5, dim=1)
        up = [F.linear(z, B.double() * 1.5) for z, B in zip(down, self.lora.B, strict=True)]
        y_FO[masks_M] += torch.cat(up, dim=1)
        return y_FO.float()


@pytest.fixture(params=["host's product", "one launch", "weights of their own"])
def merge(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    if request.param != "host's product":
        monkeypatch.setattr(product_module.cuda_stack, "usable", lambda device: True)
    return bool(request.param == "weights of their own")


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("rows", "masks"), [(7, 3), (35, 15), (70, 30)])
@torch.no_grad()
def test_mask_rows_alone_have_the_update(name: str, rows: int, masks: int, merge: bool) -> None:
    with torch.enable_grad():  # as it may be when a server starts
        case = Case(name, rows, masks, merge=merge)
    torch.testing.assert_close(case.run(case.layer), case.expected(), atol=1e-4, rtol=1e-4)
    assert int(case.order.ready_P1[0]) == 0


@torch.no_grad()
def test_other_forwards_are_the_hosts(merge: bool) -> None:
    case = Case("qkv", 7, 3, merge=merge)
    case.running = None
    assert torch.equal(case.run(case.layer), case.run(case.host))


@torch.no_grad()
def test_follows_new_weights(merge: bool) -> None:
    case = Case("gate_up", 7, 3, merge=merge)
    for layer in (case.layer, case.host):
        layer.weight.copy_(torch.linspace(-1, 1, layer.weight.numel()).view_as(layer.weight))
    case.product.refresh()
    torch.testing.assert_close(case.run(case.layer), case.expected(), atol=1e-4, rtol=1e-4)

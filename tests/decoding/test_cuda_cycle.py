"""Cycles through the CUDA kernels (interpreted on the CPU) are the cycles that torch defines."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

pytest.importorskip("triton")
from idlm.decoding import propose
from idlm.decoding.cycle import Method, Outcome, State, Texts, decode, decode_with, prefill
from idlm.decoding.layout import Layout
from idlm.decoding.params import SamplingParams
from idlm.decoding.sampling import Sampling
from idlm.model.cpu import kernels as cpu_kernels
from idlm.model.cuda import head as cuda_head
from idlm.model.cuda import stack as cuda_stack
from tests.support.random_model import random_adapter, random_config, random_decoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GREEDY = SamplingParams(temperature=0)
WARM = SamplingParams(temperature=0.8)
CUT = SamplingParams(temperature=0.9, top_p=0.8, top_k=20)
TIRED = SamplingParams(temperature=1.1, repetition_penalty=1.3, logit_bias={3: 1.0})
TIRED_GREEDY = SamplingParams(temperature=0, presence_penalty=0.7)
PROMPTS = torch.randint(0, 61, (4, 9), generator=torch.Generator().manual_seed(7)).to(DEVICE)


@contextmanager
def kernels(wanted: bool, whole: bool = False) -> Iterator[None]:
    """Decode through the CUDA kernels, or torch alone; drafts come from all tokens, or some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_head, "usable", lambda device: wanted)
        patch.setattr(cpu_kernels, "usable", lambda tensor: False)
        patch.setattr(propose, "WHOLE", 0.0 if whole else float("inf"))
        # So that some of a small vocabulary lie below, where all are not looked at.
        patch.setattr(propose, "MARGIN", float("inf") if whole else 3.0)
        yield


class Decoding:
    """Some requests that decode on a small random model."""

    def __init__(
        self, layout: str, stride: int, rule: str, params: list[SamplingParams], layers: int = 2
    ) -> None:
        config = random_config(num_layers=layers)
        decoder = random_decoder(config, peakedness=1.5).to(DEVICE)
        rows = Layout.named(layout, stride)
        adapter = random_adapter(config).to(DEVICE).freeze() if rows.num_masks else None
        self.method = Method(decoder, adapter, rows, rule)
        self.params, B = params, len(params)
        shape = config.num_layers, 1 + B * 12, config.num_kv_heads, 16, config.head_dim
        self.k, self.v = torch.zeros(2, *shape, device=DEVICE).unbind()
        blocks = torch.arange(B * 12, dtype=torch.int32, device=DEVICE) + 1  # 0 is nobody's
        self.table = blocks.view(B, 12)

    def sampling(self) -> Sampling:
        B, V = len(self.params), self.method.decoder.config.vocab_size
        prompts = PROMPTS[:B].tolist()
        return Sampling.of(self.params, range(B), prompts, [[]] * B, V, DEVICE)

    def begin(self) -> Outcome:
        B = len(self.params)
        start_B = torch.zeros(B, dtype=torch.int64, device=DEVICE)
        given = PROMPTS[:B], torch.full_like(start_B, 9), start_B, self.sampling()
        return prefill(self.method, self.k, self.v, self.table, *given)

    def go_on(self, state: State) -> Outcome:
        return decode(self.method, self.k, self.v, self.table, state, self.sampling())


def assert_same(actual: Outcome, expected: Outcome) -> None:
    N = expected.tokens_BN.shape[1]
    assert torch.equal(actual.packed_BX[:, : N + 2], expected.packed_BX[:, : N + 2])
    torch.testing.assert_close(actual.verdict.overlap_BM, expected.verdict.overlap_BM)
    bits_BM = actual.packed_BX[:, N + 2 :].int()
    assert torch.equal(bits_BM.view(torch.float32), actual.verdict.overlap_BM)
    assert torch.equal(actual.tokens_BN, expected.tokens_BN)
    assert torch.equal(actual.state.pending_B, expected.state.pending_B)
    assert torch.equal(actual.state.length_B, expected.state.length_B)
    ours, theirs = actual.state.drafts, expected.state.drafts
    assert torch.equal(ours.count_B, theirs.count_B)
    assert torch.equal(ours.tokens_BM, theirs.tokens_BM)
    # The candidates are the whole (small) vocabulary, in another order.
    q = [torch.zeros(*d.tokens_BM.shape, 61, device=DEVICE) for d in (ours, theirs)]
    for q_BMV, drafts in zip(q, (ours, theirs), strict=True):
        q_BMV.scatter_add_(2, drafts.ids_BMK, drafts.probs_BMK)
    torch.testing.assert_close(q[0], q[1])


@pytest.mark.parametrize(
    ("layout", "stride", "rule", "params"),
    [
        ("ar", 1, "rejection", [GREEDY] * 3),
        ("linear", 3, "rejection", [GREEDY] * 3),
        ("quadratic", 2, "rejection", [GREEDY] * 2),
        ("quadratic", 4, "rejection", [GREEDY] * 2),
        ("ar", 1, "coupled", [WARM, GREEDY]),
        ("linear", 3, "rejection", [WARM, GREEDY, WARM]),
        ("linear", 3, "coupled", [WARM, WARM]),
        ("quadratic", 3, "rejection", [WARM, GREEDY, WARM]),
        ("quadratic", 3, "coupled", [WARM, GREEDY, WARM]),
        ("quadratic", 2, "rejection", [CUT, TIRED, GREEDY]),
        ("linear", 3, "coupled", [TIRED, CUT]),
        ("linear", 3, "rejection", [TIRED_GREEDY, GREEDY]),
    ],
)
@torch.inference_mode()
def test_cycles(layout: str, stride: int, rule: str, params: list[SamplingParams]) -> None:
    compare(Decoding(layout, stride, rule, params))


@pytest.mark.parametrize(("layout", "stride"), [("linear", 4), ("quadratic", 3)])
@torch.inference_mode()
def test_drafts_of_the_whole_vocabulary(layout: str, stride: int) -> None:
    compare(Decoding(layout, stride, "rejection", [GREEDY] * 3), whole=True)


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize(
    ("layout", "stride", "rule", "params"),
    [
        ("ar", 1, "coupled", [GREEDY] * 4),
        ("linear", 3, "rejection", [GREEDY] * 4),
        ("quadratic", 3, "coupled", [WARM, GREEDY, WARM, GREEDY]),
        ("quadratic", 2, "rejection", [CUT, WARM, GREEDY, CUT]),
    ],
)
@torch.inference_mode()
def test_cycles_that_take_prompts_along(
    layout: str, stride: int, rule: str, params: list[SamplingParams], cuda: bool
) -> None:
    """Two requests decode, two more come: what a cycle brings all four is what two calls bring."""
    decoding = Decoding(layout, stride, rule, params)
    method, table, everybody = decoding.method, decoding.table, decoding.sampling()
    two, four = torch.arange(2, device=DEVICE), torch.arange(4, device=DEVICE)

    def chosen(rows: torch.Tensor) -> Sampling:
        tensors: dict[str, Any] = {name: x[rows] for name, x in everybody.tensors.items()}
        return replace(everybody, **tensors)

    def begin(rows: torch.Tensor) -> Outcome:
        start_B = torch.zeros_like(rows)
        given = table[rows], PROMPTS[rows], start_B + 9, start_B, chosen(rows)
        return prefill(method, decoding.k, decoding.v, *given)

    # Nine tokens in rows of six, the last of each text first.
    rows_E = torch.tensor([2, 3, 2, 3], device=DEVICE)
    tokens_EC = PROMPTS[rows_E, :6].clone()
    tokens_EC[:2, :3] = PROMPTS[2:, 6:]
    last_E = torch.tensor([True, True, False, False], device=DEVICE)
    count_E, start_E = torch.where(last_E, 3, 6), torch.where(last_E, 6, 0)
    texts = Texts(table[rows_E], tokens_EC, count_E, start_E, last_E)
    with kernels(cuda):
        patch = pytest.MonkeyPatch()
        if cuda:
            patch.setattr(cuda_stack, "usable", lambda device: True)
        state = begin(two).state
        sampling = Sampling.cat([chosen(two), chosen(rows_E)])
        given = table[two], state, texts, sampling
        actual = decode_with(method, decoding.k, decoding.v, *given)
        patch.undo()
    caches = decoding.k.clone(), decoding.v.clone()
    with kernels(False):
        begin(two)
        going = decode(method, decoding.k, decoding.v, table[two], state, chosen(two))
        begun = begin(two + 2)
        after = State.cat([going.state, begun.state])
        ours = actual.state.select(four)
        nexts = [
            decode(method, *given, table, after, chosen(four))
            for given in (caches, (decoding.k, decoding.v))
        ]
    accepted_B = torch.cat((going.verdict.accepted_B, torch.zeros_like(two)))
    assert torch.equal(actual.verdict.accepted_B[:4], accepted_B)
    assert torch.equal(actual.tokens_BN[:2], going.tokens_BN)
    assert torch.equal(actual.tokens_BN[2:4, 0], begun.tokens_BN[:, 0])
    assert torch.equal(ours.pending_B, after.pending_B)
    assert torch.equal(ours.length_B, after.length_B)
    assert torch.equal(ours.drafts.count_B, after.drafts.count_B)
    assert torch.equal(ours.drafts.tokens_BM, after.drafts.tokens_BM)
    # What the two ways have left in the cache is the same.
    assert torch.equal(nexts[0].tokens_BN, nexts[1].tokens_BN)
    torch.testing.assert_close(nexts[0].logits_BNV, nexts[1].logits_BNV, atol=1e-4, rtol=1e-3)


def compare(decoding: Decoding, whole: bool = False) -> None:
    with kernels(True, whole):
        actual = decoding.begin()
    with kernels(False, whole):
        expected = decoding.begin()
    assert_same(actual, expected)
    for _ in range(4):
        with kernels(True, whole):
            actual = decoding.go_on(expected.state)
        with kernels(False, whole):
            expected = decoding.go_on(expected.state)
        assert_same(actual, expected)


class Launches(TorchDispatchMode):
    """Counts the operations that a GPU would be given: kernels and what torch computes."""

    # Views, and what is done on a CPU only.
    FREE = (
        "as_strided alias detach empty empty_like empty_strided expand flatten new_empty numpy_T "
        "permute reshape select slice split squeeze t transpose unbind unflatten unsqueeze view "
        "_unsafe_view any is_nonzero"
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func.overloadpacket.__name__ not in self.FREE.split()
        return func(*args, **(kwargs or {}))


def launches(layout: str, stride: int, params: SamplingParams) -> int:
    """Of one cycle, without those of the layers."""
    from triton.runtime import interpreter

    counted = Launches()
    run = interpreter.GridExecutor.__call__
    layers = {"project_tile", "_attend", "_merge", "_rotate_and_append"}

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        counted.count += self.fn.__name__ not in layers
        with _disable_current_modes():
            run(self, *args, **kwargs)

    decoding = Decoding(layout, stride, "rejection", [params], layers=1)
    with kernels(False):
        state, sampling = decoding.begin().state, decoding.sampling()
    given = decoding.k, decoding.v, decoding.table, state, sampling
    with kernels(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_stack, "usable", lambda device: True)
        decode(decoding.method, *given)  # what is made once
        patch.setattr(interpreter.GridExecutor, "__call__", counting)
        with counted:
            decode(decoding.method, *given)
    return counted.count


@pytest.mark.skipif(DEVICE.type == "cuda", reason="counts what is interpreted")
@torch.inference_mode()
def test_launches_are_few() -> None:
    """Every one takes a GPU a microsecond or more, and there were hundreds."""
    found = [
        launches(layout, stride, params)
        for layout, stride in (("ar", 1), ("quadratic", 4))
        for params in (GREEDY, WARM)
    ]
    assert all(n <= most for n, most in zip(found, (14, 15, 24, 25), strict=True)), found

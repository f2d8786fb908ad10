"""Row-invariant CPU kernels, compiled from kernels.c on first use.

A row's result is bitwise the same whatever the number of rows in the call and wherever the row
stands, and an in-flight key counts exactly as a cached one. So a forward pass over drafts and
masks gives the clean rows bit for bit what one-token passes give them.

The kernels only read data pointers: no autograd, no other dtype than bf16 and fp32, no device but
the CPU. `usable` says whether a tensor qualifies; callers use torch where it does not.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from idlm.errors import ResourceError
from idlm.model.cache import models_folder

_SOURCE = Path(__file__).with_name("kernels.c")
# No contraction: only explicit FMAs, so that every specialisation of a kernel rounds alike.
_FLAGS = [
    "-std=gnu11",
    "-O3",
    "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-shared",
    "-fPIC",
]
_INT, _SIZE, _POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "idlm_init": [_POINTER],
    "idlm_linear": [
        *[_INT, _POINTER, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE],
        *[_SIZE, _SIZE, _SIZE, _SIZE, _INT, _SIZE],
    ],
    "idlm_attention": [
        *[_INT, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER],
        *[_POINTER, _POINTER, _POINTER, _POINTER, *[_SIZE] * 5, ctypes.c_float, _SIZE, _SIZE],
    ],
    "idlm_append": [
        *[_INT, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _POINTER, *[_SIZE] * 4]
    ],
    "idlm_stack": [_POINTER],
    "idlm_greedy_chain": [_POINTER],
    "idlm_rms_norm": [_INT, _POINTER, _POINTER, _POINTER, _SIZE, _SIZE, ctypes.c_float, _SIZE],
    "idlm_argmax": [_INT, _POINTER, _POINTER, _SIZE, _SIZE, _SIZE],
    "idlm_top": [_INT, _POINTER, _SIZE, _POINTER, *[_SIZE] * 4],
    "idlm_score": [_INT, _POINTER, _POINTER, _POINTER, _POINTER, *[_SIZE] * 5],
}
# These return whether their arguments were in order.
_CHECKED = ("idlm_attention", "idlm_append", "idlm_stack", "idlm_score", "idlm_greedy_chain")
_log = logging.getLogger(__name__)


class Projection(ctypes.Structure):
    """Addresses of a linear layer's weight ``[out, in]`` and bias ``[out]`` (None: no bias)."""

    _fields_ = [("weight", _POINTER), ("bias", _POINTER)]


class Layer(ctypes.Structure):
    """Addresses of a decoder layer's tensors; None for what a model does not have."""

    _fields_ = [
        *((name, _POINTER) for name in ("attn_norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, Projection) for name in ("qkv", "o", "gate_up", "down")),
    ]


class LowRank(ctypes.Structure):
    """Low-rank update of a projection; None: no update.

    ``down [parts * rank, in]`` has ``rank`` rows for each part of the outputs (q, k, v; gate, up);
    ``up`` is ``[out, rank]``.
    """

    _fields_ = [("down", _POINTER), ("up", _POINTER), ("rank", _SIZE)]


class LayerUpdate(ctypes.Structure):
    """The low-rank updates of a decoder layer."""

    _fields_ = [(name, LowRank) for name in ("qkv", "o", "gate_up", "down")]


class Pages(ctypes.Structure):
    """Where a request's keys lie: index ``i`` of request ``b`` in block ``table[b, i // tokens]``.

    ``table [batch, most]`` is int32; the strides are in elements, and a row is dense.
    """

    _fields_ = [
        ("table", _POINTER),
        *((name, _SIZE) for name in ("most", "blocks", "tokens", "block", "head", "row")),
    ]

    @classmethod
    def of(cls, cache_NKTD: torch.Tensor, table_BP: torch.Tensor) -> Pages:
        """The pages of one layer's keys or values; ``table`` has to outlive them.

        Raises:
            ValueError: the table is not dense int32, or rows are not dense.
        """
        blocks, _, tokens, _ = cache_NKTD.shape
        block, head, row, step = cache_NKTD.stride()
        if step != 1:
            raise ValueError(f"A paged cache needs dense rows; got {_describe(cache_NKTD)}.")
        return cls(
            address(table_BP, torch.int32), table_BP.shape[1], blocks, tokens, block, head, row
        )


class Stack(ctypes.Structure):
    """One pass of in-flight rows through all decoder layers and the final norm.

    ``x [batch, rows, hidden]`` (embeddings, replaced by the normed hidden states),
    ``cosine`` and ``sine [batch, rows, head_dim]`` and the tensors of the layers are dense and of
    one dtype, bf16 if ``half``, else fp32. Cache, ``start``, ``visible`` and ``positions`` as in
    `attention`; ``kv_layer`` is the stride of a layer in elements. ``update`` acts on the last
    ``masks`` rows of each request (None: no update).
    """

    _fields_ = [
        *((name, _SIZE) for name in ("half", "threads", "batch", "rows", "masks")),
        *((name, _SIZE) for name in ("layers", "hidden", "inner", "heads", "kv_heads", "head_dim")),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("layer", ctypes.POINTER(Layer)),
        ("update", ctypes.POINTER(LayerUpdate)),
        *((name, _POINTER) for name in ("norm", "x", "cosine", "sine", "k", "v")),
        ("kv_layer", _SIZE),
        ("pages", Pages),
        ("window", _SIZE),
        *((name, _POINTER) for name in ("start", "positions", "visible")),
    ]


class HeadBlock(ctypes.Structure):
    """Addresses of a sampler head's block."""

    _fields_ = [(name, _POINTER) for name in ("state_norm", "from_state", "out")]


class Chain(ctypes.Structure):
    """One run of the sampler head over the places of mask blocks, choosing greedily.

    ``h [batch, places, hidden]`` and the head's tensors are dense and of one dtype, bf16 if
    ``half``, else fp32; ``first [batch]`` are the tokens before the first place, ``ids [batch,
    places, candidates]`` those to choose from; ``tokens [batch, places]`` are written. int64.
    """

    _fields_ = [
        *((name, _SIZE) for name in ("half", "threads", "batch", "places", "depth")),
        *((name, _SIZE) for name in ("hidden", "width", "vocabulary", "candidates")),
        ("eps", ctypes.c_float),
        ("block", ctypes.POINTER(HeadBlock)),
        *((name, _POINTER) for name in ("from_hidden", "hidden_bias", "token_norm", "from_token")),
        *((name, _POINTER) for name in ("embedding", "output", "h", "first", "ids", "tokens")),
    ]


Entry = TypeVar("Entry", Layer, LayerUpdate, HeadBlock)


class Addresses(Generic[Entry]):
    """Structures of addresses of parameters, and what they point to, so that it stays."""

    def __init__(
        self,
        entries: ctypes.Array[Entry],
        dtype: torch.dtype,
        parameters: Iterable[nn.Parameter],
        derived: Iterable[torch.Tensor] = (),
    ) -> None:
        self.entries: ctypes.Array[Entry] = entries
        self.dtype = dtype
        self._parameters = list(parameters)
        # Their memory is held too, so that nothing else can come to lie at a known address.
        self._held = [p.detach() for p in self._parameters] + list(derived)
        self._known = [p.data_ptr() for p in self._parameters]

    def hold(self, dtype: torch.dtype) -> bool:
        """Whether they are of ``dtype`` and no parameter has moved, as by ``module.to(...)``."""
        return dtype is self.dtype and self._known == [p.data_ptr() for p in self._parameters]


def address(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    """Where a dense tensor of ``dtype`` lies.

    Raises:
        ValueError: it is not dense, or of another dtype.
    """
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        raise ValueError(
            f"The CPU kernels need dense tensors of {dtype}; got {tensor.dtype} with strides "
            f"{tensor.stride()}."
        )
    return tensor.data_ptr()


def usable(x: torch.Tensor) -> bool:
    """Whether the kernels take ``x``: on the CPU, bf16 or fp32, and no gradient is recorded."""
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and (x.dtype is torch.bfloat16 or x.dtype is torch.float32)
        and available()
    )


def available() -> bool:
    """Whether the compiled library is there; the first call builds it (a few seconds, once)."""
    return _library() is not None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """``x @ weight.T + bias``, summed in fp32 and rounded once.

    Args:
        x: ``[..., in]``, bf16 or fp32.
        weight: ``[out, in]``, contiguous, of the same dtype; ``bias`` ``[out]`` too.
        out: ``[..., out]``, dense in its last dimension, written in place; may be a slice of rows.
        accumulate: add to what ``out`` holds (in fp32, before rounding).
    Returns:
        ``out``, or a new tensor.
    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    if x.dim() != 3:
        features = weight.shape[0]
        target = None if out is None else out.view(1, -1, features)
        y = linear(x.reshape(1, -1, x.shape[-1]), weight, bias, target, accumulate)
        return y.view(*x.shape[:-1], features) if out is None else out
    batch, inner, width = x.shape
    features, weight_width = weight.shape
    dtype = x.dtype
    x_batch, x_row, x_step = x.stride()
    if x_step != 1:
        x = x.contiguous()
        x_batch, x_row, _ = x.stride()
    fits = (
        weight_width == width
        and weight.dtype is dtype
        and weight.stride() == (width, 1)
        and (bias is None or (bias.dtype is dtype and bias.shape == (features,)))
    )
    if out is None:
        if accumulate:
            raise ValueError("accumulate needs the tensor to add to: pass out.")
        out = torch.empty((batch, inner, features), dtype=dtype)
        y_batch, y_row = inner * features, features
    else:
        y_batch, y_row, y_step = out.stride()
        fits &= out.dtype is dtype and y_step == 1 and out.shape == (batch, inner, features)
    if not fits:
        raise ValueError(
            "linear needs x [..., in], a contiguous weight [out, in], bias [out] and out "
            f"[..., out] of one dtype; got {_describe(x, weight, bias, out)}."
        )
    _native().idlm_linear(
        dtype is torch.bfloat16,
        x.data_ptr(),
        x_batch,
        x_row,
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        y_batch,
        y_row,
        batch * inner,
        inner,
        width,
        features,
        accumulate,
        torch.get_num_threads(),
    )
    return out


def attention(
    q_BRQD: torch.Tensor,
    k_NKTD: torch.Tensor,
    v_NKTD: torch.Tensor,
    table_BP: torch.Tensor,
    start_B: torch.Tensor,
    visible_BRR: torch.Tensor,
    positions_BR: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention of in-flight rows over a paged KV cache and over each other.

    Args:
        q_BRQD: queries, bf16 or fp32; Q query heads share K KV heads, K divides Q.
        k_NKTD, v_NKTD: blocks of T tokens, of the same dtype and equal strides.
        table_BP: index ``i`` of request ``b`` lies in block ``table[b, i // T]`` at ``i % T``;
            int32. Index ``i < start_b`` holds the token at position ``i``; index ``start_b + c``
            holds in-flight row ``c``.
        start_B: committed tokens, int64; every row sees them (within the window).
        visible_BRR: bool; ``visible[b, r, c]``: row ``r`` sees in-flight row ``c``.
        positions_BR: positions of the in-flight rows, int64.
        scale: factor of the scores.
        window: a row sees keys less than this many positions before it; None: all.
    Returns:
        ``[B, R, Q, D]``, contiguous; 0 for a row that sees no key.
    Raises:
        ValueError: shapes, dtypes or strides do not fit, or rows do not fit into their blocks.
    """
    B, R, Q, D = q_BRQD.shape
    N, K, T = k_NKTD.shape[:3]
    if q_BRQD.stride(-1) != 1:
        q_BRQD = q_BRQD.contiguous()
    if (
        k_NKTD.shape != (N, K, T, D)
        or v_NKTD.shape != k_NKTD.shape
        or v_NKTD.stride() != k_NKTD.stride()
        or k_NKTD.dtype is not q_BRQD.dtype
        or v_NKTD.dtype is not q_BRQD.dtype
        or Q % K
        or table_BP.shape[:-1] != (B,)
        or start_B.shape != (B,)
        or visible_BRR.shape != (B, R, R)
        or positions_BR.shape != (B, R)
        or visible_BRR.dtype is not torch.bool
        or start_B.dtype is not torch.int64
        or positions_BR.dtype is not torch.int64
    ):
        raise ValueError(
            "attention needs q [B, R, Q, D], k and v [N, K, T, D] of one dtype and layout, a table "
            "[B, P], int64 start [B] and positions [B, R], bool visible [B, R, R]; got "
            f"{_describe(q_BRQD, k_NKTD, v_NKTD, table_BP, start_B, visible_BRR, positions_BR)}."
        )
    start_B = start_B.contiguous()
    visible_BRR = visible_BRR.contiguous()
    positions_BR = positions_BR.contiguous()
    out_BRQD = torch.empty((B, R, Q, D), dtype=q_BRQD.dtype)
    fits = _native().idlm_attention(
        q_BRQD.dtype is torch.bfloat16,
        q_BRQD.data_ptr(),
        *q_BRQD.stride()[:3],
        k_NKTD.data_ptr(),
        v_NKTD.data_ptr(),
        ctypes.byref(Pages.of(k_NKTD, table_BP)),
        out_BRQD.data_ptr(),
        start_B.data_ptr(),
        visible_BRR.data_ptr(),
        positions_BR.data_ptr(),
        B,
        R,
        K,
        Q // K,
        D,
        scale,
        window or 0,
        torch.get_num_threads(),
    )
    if not fits:
        raise ValueError(_no_fit(R, start_B, table_BP, T))
    return out_BRQD


def append(
    x_BRKD: torch.Tensor, cache_NKTD: torch.Tensor, table_BP: torch.Tensor, start_B: torch.Tensor
) -> None:
    """Write in-flight keys or values into the cache: row ``r`` goes to index ``start_b + r``.

    Args:
        x_BRKD: bf16 or fp32, dense in its last dimension.
        cache_NKTD: written in place, of the same dtype; it and ``table_BP`` as in `attention`.
        start_B: int64.
    Raises:
        ValueError: shapes, dtypes or strides do not fit, or rows do not fit into their blocks.
    """
    B, R, K, D = x_BRKD.shape
    x_batch, x_row, x_head, x_step = x_BRKD.stride()
    N, _, T, _ = cache_NKTD.shape
    if (
        cache_NKTD.shape != (N, K, T, D)
        or cache_NKTD.dtype is not x_BRKD.dtype
        or x_step != 1
        or table_BP.shape[:-1] != (B,)
        or start_B.shape != (B,)
        or not start_B.is_contiguous()
        or start_B.dtype is not torch.int64
    ):
        raise ValueError(
            "append needs x [B, R, K, D] and cache [N, K, T, D] of one dtype, dense in D, a table "
            f"[B, P] and a contiguous int64 start [B]; got "
            f"{_describe(x_BRKD, cache_NKTD, table_BP, start_B)}."
        )
    fits = _native().idlm_append(
        x_BRKD.dtype is torch.bfloat16,
        x_BRKD.data_ptr(),
        x_batch,
        x_row,
        x_head,
        cache_NKTD.data_ptr(),
        ctypes.byref(Pages.of(cache_NKTD, table_BP)),
        start_B.data_ptr(),
        B,
        R,
        K,
        D,
    )
    if not fits:
        raise ValueError(_no_fit(R, start_B, table_BP, T))


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension, rounded once.

    Args:
        x: ``[..., D]``, bf16 or fp32.
        weight_D: contiguous, of the same dtype.
    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    width = x.shape[-1]
    if weight_D.shape != (width,) or weight_D.dtype is not x.dtype or not weight_D.is_contiguous():
        raise ValueError(
            "rms_norm needs x [..., D] and a contiguous weight [D] of one dtype; got "
            f"{_describe(x, weight_D)}."
        )
    x = x.contiguous()
    y = torch.empty_like(x)
    _native().idlm_rms_norm(
        x.dtype is torch.bfloat16,
        x.data_ptr(),
        weight_D.data_ptr(),
        y.data_ptr(),
        x.numel() // width,
        width,
        eps,
        torch.get_num_threads(),
    )
    return y


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """The first index of the largest number in the last dimension, ``[...]``, int64.

    Args:
        logits: ``[..., V]``, bf16 or fp32.
    """
    logits = logits.contiguous()
    ids = torch.empty(logits.shape[:-1], dtype=torch.int64)
    _native().idlm_argmax(
        logits.dtype is torch.bfloat16,
        logits.data_ptr(),
        ids.data_ptr(),
        ids.numel(),
        logits.shape[-1],
        torch.get_num_threads(),
    )
    return ids


def top(logits: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` largest of the last dimension by their leading 16 bits: all there is of a bf16.

    Of numbers that are equal in those bits the first ones are taken.

    Args:
        logits: ``[..., V]``, bf16 or fp32, ``k <= V``.
    Returns:
        Indices ``[..., k]``, int64, ascending.
    Raises:
        ValueError: ``k`` is more than there are.
    """
    *shape, n = logits.shape
    if not 0 < k <= n:
        raise ValueError(f"Cannot take the largest {k} of {n}.")
    rows = logits.reshape(-1, n)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    ids = torch.empty((len(rows), k), dtype=torch.int64)
    _native().idlm_top(
        rows.dtype is torch.bfloat16,
        rows.data_ptr(),
        rows.stride(0),
        ids.data_ptr(),
        len(rows),
        n,
        k,
        torch.get_num_threads(),
    )
    return ids.view(*shape, k)


def score(x_BH: torch.Tensor, weight_VH: torch.Tensor, ids_BK: torch.Tensor) -> torch.Tensor:
    """``x @ weight.T`` at some outputs of each row only: ``[B, K]``, fp32, not rounded.

    Args:
        x_BH, weight_VH: bf16 or fp32, of one dtype; the weight contiguous.
        ids_BK: outputs of each row, int64.
    Raises:
        ValueError: shapes or dtypes do not fit, or an id is not an output's.
    """
    (B, H), (V, K) = x_BH.shape, (weight_VH.shape[0], ids_BK.shape[1])
    x_BH, ids_BK = x_BH.contiguous(), ids_BK.contiguous()
    scores_BK = torch.empty((B, K), dtype=torch.float32)
    fits = (
        weight_VH.shape == (V, H)
        and ids_BK.shape == (B, K)
        and weight_VH.dtype is x_BH.dtype
        and weight_VH.is_contiguous()
        and ids_BK.dtype is torch.int64
    )
    if not fits or not _native().idlm_score(
        x_BH.dtype is torch.bfloat16,
        x_BH.data_ptr(),
        weight_VH.data_ptr(),
        ids_BK.data_ptr(),
        scores_BK.data_ptr(),
        B,
        V,
        K,
        H,
        torch.get_num_threads(),
    ):
        raise ValueError(
            "score needs x [B, H] and a contiguous weight [V, H] of one dtype, and int64 ids "
            f"[B, K] below V; got {_describe(x_BH, weight_VH, ids_BK)}."
        )
    return scores_BK


def run(stack: Stack) -> None:
    """Run a pass of rows; the caller answers for the addresses.

    Raises:
        ValueError: the rows do not fit into their requests' blocks.
    """
    if not _native().idlm_stack(ctypes.byref(stack)):
        pages = stack.pages
        raise ValueError(
            f"{stack.rows} rows do not fit into {pages.most} blocks of {pages.tokens} tokens each."
        )


def run_chain(chain: Chain) -> None:
    """Run the head; the caller answers for the addresses.

    Raises:
        ValueError: a token or candidate is not in the vocabulary.
    """
    if not _native().idlm_greedy_chain(ctypes.byref(chain)):
        raise ValueError(f"A token is not in the vocabulary of {chain.vocabulary}.")


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (after one warning) where they cannot be had."""
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.SubprocessError, ResourceError) as error:
        _log.warning(
            "Fast CPU kernels are off, torch is used instead (slower, and bf16 results may depend "
            "on the number of rows): %s. To switch them on, install a C compiler (for example gcc) "
            "or name one in CC.",
            error,
        )
        return None
    for name, argtypes in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes = argtypes
        function.restype = ctypes.c_bool if name in _CHECKED else None
    library.idlm_init(_torch_thread_pool())
    return library


@functools.cache
def _native() -> ctypes.CDLL:
    library = _library()
    if library is None:
        raise ResourceError("The CPU kernels are not available; see the warning above.")
    return library


def _build() -> Path:
    """Path of the shared library for this source, compiler and CPU; compiled if need be."""
    compiler = _compiler()
    version = _run([*compiler, "--version"])
    key = "\0".join([_SOURCE.read_text("utf-8"), *compiler, version, *_FLAGS, _cpu()])
    folder = models_folder().parent / "kernels"
    target = folder / f"cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    # Two processes may both compile; either result is whole, and the same.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        built = Path(temporary) / target.name
        _run([*compiler, *_FLAGS, "-o", str(built), str(_SOURCE)])
        os.replace(built, target)
    return target


def _compiler() -> list[str]:
    if command := shlex.split(os.environ.get("CC", "")):
        return command
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise ResourceError("no C compiler (cc, gcc or clang) was found")


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300)
    if result.returncode:
        raise ResourceError(f"{shlex.join(command)} failed: {result.stderr.strip()[-500:]}")
    return result.stdout


def _cpu() -> str:
    """What `-march=native` depends on: the CPU's name and features."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _torch_thread_pool() -> int | None:
    """Address of `GOMP_parallel` in the OpenMP runtime that torch runs.

    A runtime of our own would keep a second pool of threads, spinning against torch's. LLVM's and
    Intel's runtimes have the function too.
    """
    for path in _openmp_runtimes():
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, _POINTER).value
        except (OSError, AttributeError):
            continue
    _log.warning("torch's OpenMP runtime was not found: the CPU kernels use one thread.")
    return None


def _openmp_runtimes() -> list[str]:
    """Loaded OpenMP libraries, torch's own first."""
    bundled = Path(torch.__file__).parent / "lib"
    try:
        maps = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
        paths = {line.split(maxsplit=5)[-1] for line in maps if "omp" in line}
    except OSError:
        paths = {str(path) for path in bundled.iterdir()}
    names = ("libgomp", "libiomp5", "libomp")
    loaded = [path for path in sorted(paths) if Path(path).name.startswith(names)]
    return sorted(loaded, key=lambda path: not path.startswith(str(bundled)))


def _no_fit(rows: int, start_B: torch.Tensor, table_BP: torch.Tensor, tokens: int) -> str:
    return (
        f"{rows} rows after {start_B.tolist()} tokens exceed the cache of {table_BP.shape[1]} "
        f"blocks of {tokens} tokens each, or a block is not there."
    )


def _describe(*tensors: torch.Tensor | None) -> str:
    return ", ".join(
        "None" if t is None else f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}"
        for t in tensors
    )

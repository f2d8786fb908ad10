"""Triton kernel of `slot_attention`."""

# No deferred annotations here: Triton reads them.
import triton
import triton.language as tl


@triton.jit
def attend(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    index_ptr,
    out_ptr,
    scale,
    slot_stride,
    S,
    K: tl.constexpr,
    G: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one slot's key and value of one KV head; attend for the head's G query rows."""
    slot = tl.program_id(0)
    head = tl.program_id(1)
    index = tl.load(index_ptr + slot).to(tl.int32)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    real = dims < D
    new = (slot * K + head) * D + dims
    row_offsets = (slot * K + head) * G * D + rows[:, None] * D + dims[None, :]
    row_mask = (rows[:, None] < G) & real[None, :]
    q = tl.load(q_ptr + row_offsets, mask=row_mask, other=0.0)
    k_new = tl.load(k_ptr + new, mask=real, other=0.0)
    v_new = tl.load(v_ptr + new, mask=real, other=0.0)
    base = slot.to(tl.int64) * slot_stride + head * S * D
    tl.store(k_cache_ptr + base + index * D + dims, k_new, mask=real)
    tl.store(v_cache_ptr + base + index * D + dims, v_new, mask=real)
    # The new token is taken from registers; the loop reads what stood there before it.
    top = tl.sum(q.to(tl.float32) * k_new.to(tl.float32)[None, :], 1) * scale
    total = tl.full([ROWS], 1.0, tl.float32)
    out = tl.zeros([ROWS, DIM], tl.float32) + v_new.to(tl.float32)[None, :]
    for first in range(0, index, BLOCK):
        keys = first + tl.arange(0, BLOCK)
        old = keys < index
        k = tl.load(
            k_cache_ptr + base + keys[None, :] * D + dims[:, None],
            mask=old[None, :] & real[:, None],
            other=0.0,
        )
        v = tl.load(
            v_cache_ptr + base + keys[:, None] * D + dims[None, :],
            mask=old[:, None] & real[None, :],
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        scores = tl.where(old[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(weights, 1)
        out = out * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        top = higher
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row_offsets, out, mask=row_mask)

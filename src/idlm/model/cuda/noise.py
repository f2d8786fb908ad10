"""The random numbers of `decoding.random` inside Triton kernels."""

# No deferred annotations here: Triton reads them.
import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)
STEP = tl.constexpr(2.0**-53)


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return x ^ (x >> 31)


@triton.jit
def _open_unit(bits):  # type: ignore[no-untyped-def]
    return ((bits >> 11).to(tl.float64) + 0.5) * STEP


@triton.jit
def key_of(seed, position, stream: tl.constexpr):  # type: ignore[no-untyped-def]
    """State of the stream of these seeds and positions (int64), uint64."""
    start = _mix(_mix(seed.to(tl.uint64)) + position.to(tl.uint64) * GOLDEN)
    return _mix(start ^ stream)


@triton.jit
def uniform(key):  # type: ignore[no-untyped-def]
    """One number in (0, 1), fp64."""
    return _open_unit(_mix(key + GOLDEN))


@triton.jit
def exponential(key, token):  # type: ignore[no-untyped-def]
    """Exponential(1) noise of these tokens (integers from 0), fp32."""
    bits = _mix(key + (token + 1).to(tl.uint64) * GOLDEN)
    return (-tl.log(_open_unit(bits))).to(tl.float32)

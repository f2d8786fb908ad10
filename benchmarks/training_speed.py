"""Speed of training steps: tokens/s, mask rows/s and model FLOP utilisation, on random weights.

    python benchmarks/training_speed.py                      # 135M and 1.7B shapes, both kinds
    python benchmarks/training_speed.py --kind full --shape 1.7B --batch 16 --accumulate 2
    python benchmarks/training_speed.py --shape small=64,128,2,4,2,64,500 --batch 2 --length 64 \\
        --anchors 4 --steps 2                                # any sizes, for a CPU too

FLOPs are those that the method needs, not those that are run (no recomputation, no mask rows'
share of the block-diagonal zeros of the LoRA). With ``P`` weights in the layers' matrices, ``U``
in the output layer, ``L`` in the LoRA, ``S`` in the sampler head, ``T`` clean and ``M`` mask rows,
a product of ``n`` rows with ``w`` weights costs ``2 n w`` and its backward pass ``2 n w`` for each
gradient (input, weight) that is needed:

    full       6 (P + U) (T + M)                 every row: forward, both gradients
    lossless   2 P T                             clean rows: forward only
               + 4 P M + 6 (L + S) M             mask rows; the frozen weights need no gradient
               + (6 + 6 / 4) U M                 student (2 + 2) and teacher (2); a quarter again
                                                 without the sampler head

Attention costs ``4 heads head_dim`` per layer for each pair of a row and a key that it sees, and
twice as much again backwards (full: all rows, lossless: mask rows).
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch

from idlm.model.config import ModelConfig, RopeConfig
from idlm.model.decoder import Decoder
from idlm.training.config import ConvertConfig
from idlm.training.conversion import Conversion, FullConversion, LosslessConversion
from idlm.training.data import Batch, Corpus
from idlm.training.lossless import MARGINAL_STRIDE
from idlm.training.parallel import torchrun
from idlm.training.trainer import Trainer

# hidden, intermediate, layers, heads, KV heads, head size, vocabulary: SmolLM2's
SHAPES = {
    "135M": (576, 1536, 30, 9, 3, 64, 49152),
    "1.7B": (2048, 8192, 24, 32, 32, 64, 49152),
}
PROMPT = 32  # tokens of a document that no answer covers


def main() -> None:
    """Measure every shape and kind, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--shape",
        action="append",
        metavar="NAME[=SIZES]",
        help=f"{', '.join(SHAPES)} (default: both), or a name with sizes: hidden, intermediate,\n"
        "layers, heads, KV heads, head size, vocabulary",
    )
    parser.add_argument("--kind", action="append", choices=("lossless", "full"))
    parser.add_argument("--batch", type=int, default=32, help="rows per step (default: 32)")
    parser.add_argument("--length", type=int, default=1024, help="tokens per row (default: 1024)")
    parser.add_argument("--anchors", type=int, default=256, help="blocks per row (default: 256)")
    parser.add_argument("--block-size", type=int, default=7, help="masks per block (default: 7)")
    parser.add_argument("--accumulate", type=int, default=4, help="passes per step (default: 4)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before (default: 2)")
    parser.add_argument("--steps", type=int, default=4, help="steps timed (default: 4)")
    parser.add_argument(
        "--peak-tflops",
        type=float,
        default=989.0,
        help="of the device, for the utilisation (default: 989, dense bf16 of an H100 or H200)",
    )
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{hardware} | torch {torch.__version__} | {shlex.join(sys.argv)}")
    print("| shape | kind | ms/step | tokens/s | mask rows/s | TFLOP/s | utilisation | peak GB |")
    print("| --- | --- |" + " ---: |" * 6)
    for text in args.shape or SHAPES:
        name, _, sizes = text.partition("=")
        shape = tuple(map(int, sizes.split(","))) if sizes else SHAPES[name]
        for kind in args.kind or ("lossless", "full"):
            with torchrun(device):
                print(f"| {name} | {kind} | {measure(shape, kind, args, device)} |", flush=True)


def measure(
    shape: tuple[int, ...], kind: str, args: argparse.Namespace, device: torch.device
) -> str:
    """One row of the table, without its first two cells."""
    steps = args.warmup + args.steps
    config = ConvertConfig(
        kind=kind,
        batch=args.batch,
        length=args.length,
        anchors=args.anchors,
        block_size=args.block_size,
        accumulate=args.accumulate,
        eval_rows=args.batch // args.accumulate,
        steps=steps,
    )
    corpus = random_corpus(shape[-1], args.length, 2 * args.batch)
    trainer = Trainer(start(shape, config, device), corpus, corpus, config, None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.warmup):
        trainer.train_step()
    synchronize(device)
    began = time.perf_counter()
    for _ in range(args.steps):
        trainer.train_step()
    synchronize(device)
    seconds = (time.perf_counter() - began) / args.steps
    flops = model_flops(shape, config, trainer.loader.batch(0)) / seconds
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    cells = (
        f"{1e3 * seconds:.0f}",
        f"{config.batch * config.length / seconds:,.0f}",
        f"{config.batch * config.anchors * config.block_size / seconds:,.0f}",
        f"{flops / 1e12:.3g}",
        f"{100 * flops / 1e12 / args.peak_tflops:.1f}%",
        f"{memory:.1f}",
    )
    return " | ".join(cells)


def start(shape: tuple[int, ...], config: ConvertConfig, device: torch.device) -> Conversion:
    """A conversion of random weights."""
    hidden, inner, layers, heads, kv_heads, head_dim, vocabulary = shape
    model = ModelConfig(
        model_type="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope=RopeConfig(100000.0),
        tie_word_embeddings=True,
    )
    with torch.device(device):
        decoder = Decoder(model)
    for parameter in decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if config.kind == "lossless":
        return LosslessConversion(decoder.to(dtype), config, "random")
    return FullConversion(
        decoder, config, "random", dtype=dtype, mask_token_id=0, source=Path("unused")
    )


def random_corpus(vocabulary: int, length: int, count: int) -> Corpus:
    """Documents that fill a row each and are answers after their first tokens."""
    tokens = np.random.default_rng(0).integers(1, vocabulary, count * length, dtype=np.int32)
    spans = np.array([[min(PROMPT, length // 2), length]] * count)
    offsets = np.arange(count + 1)
    return Corpus(tokens, offsets * length, spans, offsets, np.zeros(count, np.float32))


def model_flops(shape: tuple[int, ...], config: ConvertConfig, batch: Batch) -> float:
    """FLOPs of one step over ``batch``, as the module's docstring counts them."""
    hidden, inner, layers, heads, kv_heads, head_dim, vocabulary = shape
    q, kv = heads * head_dim, kv_heads * head_dim
    P = layers * (hidden * (q + 2 * kv) + q * hidden + 3 * hidden * inner)
    U = vocabulary * hidden
    T, m = batch.tokens_BT.numel(), config.block_size
    M = batch.anchors_BA.numel() * m
    clean_pairs = int((batch.positions_BT + 1).sum())
    anchors_BA = batch.positions_BT.gather(1, batch.anchors_BA)
    mask_pairs = int((m * (anchors_BA + 1) + m * (m + 1) // 2).sum())
    pair = 4 * q * layers
    if config.kind == "full":
        return float(6 * (P + U) * (T + M) + 3 * pair * (clean_pairs + mask_pairs))
    L = layers * config.rank * (4 * hidden + q + 2 * kv + q + 2 * hidden + 3 * inner + hidden)
    S = config.head_depth * 7 * hidden * config.head_width
    return float(
        2 * P * T
        + (4 * P + 6 * (L + S)) * M
        + (6 + 6 / MARGINAL_STRIDE) * U * M
        + pair * clean_pairs
        + 3 * pair * mask_pairs
    )


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()

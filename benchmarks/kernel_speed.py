"""Times of the CUDA kernels by themselves: projections, attention, and all layers together.

    python benchmarks/kernel_speed.py --output kernels.json

Everything is timed as a captured graph, over weights that do not fit into the L2 cache. A section
that fails prints its traceback, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from random_models import DEVICE, DTYPE, RANK, bandwidth, config, random_model

from idlm.decoding.layout import Layout, row_tables
from idlm.model.adapter import Adapter
from idlm.model.attention import PagedAttention, grouped_attention, visibility_bias
from idlm.model.cuda.low_rank import LowRank
from idlm.model.cuda.paged_attention import attend
from idlm.model.cuda.projection import add, project
from idlm.model.cuda.rotation import Heads, rotate_and_append
from idlm.model.cuda.rows import Rows
from idlm.model.cuda.stream import begin
from idlm.model.cuda.tile import Tile
from idlm.model.decoder import Part

COLD_BYTES = 400e6  # several times the L2 cache
BLOCK = 16
BATCHES: list[int] = []
Report = Callable[..., None]
FORWARDS = {"ar": Layout.named("ar", 1), "linear4": Layout.named("linear", 4)}
FORWARDS["quadratic4"] = Layout.named("quadratic", 4)


def microseconds(run: Callable[[], object], calls: int = 1, repeats: int = 15) -> float:
    """Median time of ``run``, which makes ``calls`` calls, by call, as a captured graph."""
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            run()
        for _ in range(3):
            graph.replay()
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / calls)
    return statistics.median(times)


def tiles(N: int, I: int) -> list[Tile]:  # noqa: E741
    """Tiles worth a try for a product of so many rows and inputs."""
    found = []
    for height in [N] if N <= 64 else [64, 128]:
        for width in {16: [16, 32, 64], 32: [32, 64]}.get(height, [64, 128]):
            for step in [64] if I % 128 else [64, 128]:
                warps = 8 if height * width >= 128 * 128 else 4
                for stages in (3, 5) if N <= 64 else (3,):
                    if (height + width) * step * 2 * stages < 200_000:
                        found.append(Tile(height, width, step, warps, stages))
    return found


def projections(model: str) -> dict[str, tuple[int, int, tuple[int, ...], dict[str, bool]]]:
    """Inputs, outputs, modules and surroundings of the four projections of a layer."""
    c = config(model)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    H, inner = c.hidden_size, c.intermediate_size
    return {
        "qkv": (H, q + 2 * kv, (q, kv, kv), {"norm": True}),
        "o": (q, H, (H,), {"residual": True}),
        "gate_up": (H, 2 * inner, (inner, inner), {"norm": True, "gated": True}),
        "down": (inner, H, (H,), {"residual": True}),
    }


def projection_cases() -> Iterator[tuple[str, str, int, int, Tile]]:
    """Model, projection, rows, mask rows and tile of everything that is timed."""
    for N, masks in ((16, 12), (64, 48), (128, 96), (256, 192)):
        for model in ("135M", "8B"):
            for name, (I, _, modules, _) in projections(model).items():  # noqa: E741
                for tile in tiles(N, I):
                    if len(modules) == 1 or all(m % tile.outputs == 0 for m in modules):
                        yield model, name, N, masks, tile


def projected(
    model: str, name: str, N: int, masks: int, tile: Tile | None, copies: int
) -> tuple[Callable[[bool], None], Callable[[], None]]:
    """What runs the kernel (with the update or not) and the library's product ``copies`` times."""
    I, O, modules, around = projections(model)[name]  # noqa: E741
    rank = RANK[model]
    x = torch.randn(N, I, device=DEVICE, dtype=DTYPE)
    weights = torch.randn(copies, O, I, device=DEVICE, dtype=DTYPE) * I**-0.5
    A = torch.randn(copies, len(modules) * rank, I, device=DEVICE, dtype=DTYPE) * I**-0.5
    B = torch.randn(O, rank, device=DEVICE, dtype=DTYPE)
    ones = torch.ones(max(I, O), device=DEVICE, dtype=DTYPE)
    given = begin(x, ones[:I], 1e-6) if around.get("norm") else x
    onto = None
    if around.get("residual"):
        onto = begin(torch.zeros(N, O, device=DEVICE, dtype=DTYPE), ones[:O], 1e-6)
    ready = torch.zeros(copies, 1, device=DEVICE, dtype=torch.int32)

    def kernel(update: bool) -> None:
        ready.zero_()
        for i in range(copies):
            how: dict[str, Any] = {
                "low_rank": LowRank(A[i], B, modules) if update else None,
                "first_mask": N - masks,
                "ready_1": ready[i],
                "tile": tile,
            }
            if onto is None:
                project(given, weights[i], gated=around.get("gated", False), **how)
            else:
                add(onto, x, weights[i], norm_H=ones[:O], eps=1e-6, **how)

    def library() -> None:
        for i in range(copies):
            F.linear(x, weights[i])

    return kernel, library


def time_projections(report: Report, deadline: float) -> None:
    cases: dict[tuple[str, str, int, int], list[Tile]] = {}
    for *case, tile in projection_cases():
        cases.setdefault(tuple(case), []).append(tile)  # type: ignore[arg-type]
    for (model, name, N, masks), candidates in cases.items():
        I, O, _, _ = projections(model)[name]  # noqa: E741
        copies = min(int(COLD_BYTES / (2 * I * O)) + 1, 100)
        tried = []
        _, library = projected(model, name, N, masks, None, copies)
        cublas = microseconds(library, copies)
        for tile in candidates:
            if time.monotonic() > deadline:
                print("projections: out of time", flush=True)
                return
            line: dict[str, Any] = {
                "what": "project",
                "model": model,
                "name": name,
                "rows": N,
                "tile": [tile.rows, tile.outputs, tile.inputs, tile.warps, tile.stages],
                "cublas_us": cublas,
            }
            try:
                kernel, _ = projected(model, name, N, masks, tile, copies)
                line["plain_us"] = microseconds(lambda: kernel(False), copies)  # noqa: B023
                line["update_us"] = microseconds(lambda: kernel(True), copies)  # noqa: B023
                tried.append(line)
            except Exception as error:
                line["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            report(line, quiet="error" not in line)
        tried.sort(key=lambda line: line["update_us"])
        print(model, name, N, f"cublas {cublas:.2f}", end=" | ")
        for line in tried[:3]:
            print(line["tile"], f"{line['plain_us']:.2f} {line['update_us']:.2f}", end=" | ")
        print(flush=True)


def compile_share(share: int, shares: int) -> None:
    """Compile every ``shares``-th kernel, so that several processes fill the cache together."""
    torch.manual_seed(0)
    for model, name, N, masks, tile in list(projection_cases())[share::shares]:
        try:
            kernel, _ = projected(model, name, N, masks, tile, 1)
            kernel(False)
            kernel(True)
        except Exception as error:
            print(model, name, N, tile, f"{type(error).__name__}: {str(error)[:120]}")
    torch.cuda.synchronize()


def rows_of(layout: Layout, batch: int, start: int, table_BP: torch.Tensor) -> Rows:
    tables = row_tables(layout, DEVICE)
    drafts_B = torch.full((batch,), layout.stride - 1, device=DEVICE)
    start_B = torch.full((batch,), start, device=DEVICE)
    return Rows(
        batch,
        layout.stride,
        layout.num_masks,
        table_BP,
        start_B,
        start_B[:, None] + tables.offsets_NR[drafts_B],
        tables.visible_NRR[drafts_B],
        first_clean=0,
        first_mask=batch * layout.stride,
    )


def time_attention(report: Report, deadline: float) -> None:
    for model in ("135M", "8B"):
        c = config(model)
        K, D, W = c.num_kv_heads, c.head_dim, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
        for start, batch in ((512, 1), (512, 16), (512, 64), (8192, 1), (8192, 16), (32000, 1)):
            P = -(-(start + 32) // BLOCK)
            k, v = torch.randn(2, batch * P + 1, K, BLOCK, D, device=DEVICE, dtype=DTYPE).unbind()
            table = (torch.randperm(batch * P, device=DEVICE) + 1).view(batch, P).int()
            for name, layout in FORWARDS.items():
                if time.monotonic() > deadline:
                    print("attention: out of time", flush=True)
                    return
                line: dict[str, Any] = {"what": "attend", "model": model, "context": start}
                line |= {"batch": batch, "forward": name}
                rows = rows_of(layout, batch, start, table)
                R, S = layout.num_rows, start + layout.num_rows
                qkv = torch.randn(batch * R, W, device=DEVICE, dtype=DTYPE)
                cos = torch.randn(batch * R, D, device=DEVICE, dtype=DTYPE)
                norm = torch.ones(D, device=DEVICE, dtype=DTYPE) if c.qk_norm else None
                line["attend_us"] = microseconds(lambda: attend(qkv, k, v, [rows]))  # noqa: B023
                cells = torch.randint(BLOCK, len(k) * BLOCK, (batch * R,), device=DEVICE)
                heads = Heads(cos, cos, cells, k, v)
                line["rotate_us"] = microseconds(
                    lambda: rotate_and_append(qkv, heads, norm, norm, 1e-6)  # noqa: B023
                )
                # The library's attention over keys that lie in a row, as it would like them.
                kk = k[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :S].contiguous()
                vv = v[table.long()].transpose(1, 2).flatten(2, 3)[:, :, :S].contiguous()
                q = torch.randn(batch, R, c.num_heads, D, device=DEVICE, dtype=DTYPE)
                bias = visibility_bias(
                    torch.cat(
                        (
                            torch.ones(batch, R, start, dtype=torch.bool, device=DEVICE),
                            rows.visible_BRR,
                        ),
                        2,
                    ),
                    DTYPE,
                )
                line["sdpa_us"] = microseconds(lambda: grouped_attention(q, kk, vv, bias))  # noqa: B023
                line["GBps"] = 4e-3 * batch * S * K * D / line["attend_us"]
                report(line)


def time_layers(model: str, report: Report, deadline: float, bandwidth: float) -> None:
    decoder, adapter = random_model(model)
    c, context = decoder.config, 512
    # What a forward has to read: all but the embedding.
    weight_bytes = 2 * sum(p.numel() for p in decoder.layers.parameters())
    most, P = 64, -(-(context + 64) // BLOCK)
    shape = (c.num_layers, most * P + 1, c.num_kv_heads, BLOCK, c.head_dim)
    k, v = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2))
    table = (torch.randperm(most * P, device=DEVICE) + 1).view(most, P).int()
    for batch in BATCHES:
        for name, layout in FORWARDS.items():
            rows = rows_of(layout, batch, context, table[:batch])
            tokens = torch.randint(c.vocab_size, (batch, layout.stride), device=DEVICE)
            for adapted in (False, True) if layout.num_masks else (False,):
                if time.monotonic() > deadline:
                    print("layers: out of time", flush=True)
                    return
                lora = adapter if adapted else None
                if layout.num_masks and lora is None:
                    lora = without_updates(adapter)

                def forward() -> None:
                    attention = PagedAttention(
                        k,
                        v,
                        rows.table_BP,  # noqa: B023
                        rows.start_B,  # noqa: B023
                        rows.positions_BR,  # noqa: B023
                        rows.visible_BRR,  # noqa: B023
                    )
                    part = Part(tokens, attention, layout.num_masks)  # noqa: B023
                    decoder.together([part], lora)  # noqa: B023

                began = time.monotonic()
                line: dict[str, Any] = {
                    "what": "layers",
                    "model": model,
                    "batch": batch,
                    "forward": name,
                }
                line["updated"] = adapted
                line["us"] = microseconds(forward)
                line["floor_us"] = weight_bytes / bandwidth * 1e6
                line["seconds_to_make"] = time.monotonic() - began
                report(line)
                if batch in (1, 64):
                    profile(f"{model} {name} {batch} {adapted}", forward)


def profile(title: str, run: Callable[[], object]) -> None:
    """Print what the kernels of a captured ``run`` take."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
    averages = sorted(profiler.key_averages(), key=lambda a: -a.self_device_time_total)
    parts = [
        f"{a.key[:28]} {a.count // 3}x{a.self_device_time_total / a.count:.2f}"
        for a in averages[:9]
    ]
    print("   profile", title, "|", "; ".join(parts), flush=True)


def without_updates(adapter: Adapter) -> Adapter:
    """The same masks, no LoRA."""
    from dataclasses import replace

    with torch.device("meta"):
        bare = Adapter(replace(adapter.config, projections=()), config("135M"))
    bare.mask_embedding = adapter.mask_embedding
    while len(bare.lora) < len(adapter.lora):
        bare.lora.append(torch.nn.ModuleDict())
    return bare.freeze()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--batches", default="1,16,64", help="of the layers")
    parser.add_argument("--sections", default="135M,8B,attention,projections")
    parser.add_argument("--compilers", type=int, default=14, help="processes that compile")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.share is not None:
        compile_share(args.share, args.compilers)
        return
    end = time.monotonic() + args.seconds
    lines: list[dict[str, Any]] = []

    def report(line: dict[str, Any], quiet: bool = False) -> None:
        lines.append(line)
        if not quiet:
            short = {k: round(v, 2) if isinstance(v, float) else v for k, v in line.items()}
            print(*(f"{key}={value}" for key, value in short.items()), flush=True)
        if args.output:
            args.output.write_text(json.dumps(lines))

    names = args.sections.split(",")
    if "projections" in names:
        workers = [
            subprocess.Popen([sys.executable, __file__, "--share", str(i)])
            for i in range(args.compilers)
        ]
        for worker in workers:
            worker.wait(timeout=max(end - time.monotonic(), 1))
        print("compiled", round(end - time.monotonic(), 1), "s left", flush=True)
    speed = bandwidth()[0] * 1e9
    report({"what": "copy", "GBps": speed / 1e9, "device": torch.cuda.get_device_name()})
    BATCHES[:] = map(int, args.batches.split(","))
    sections: dict[str, Callable[[float], None]] = {
        "135M": lambda until: time_layers("135M", report, until, speed),
        "8B": lambda until: time_layers("8B", report, until, speed),
        "attention": lambda until: time_attention(report, until),
        "projections": lambda until: time_projections(report, until),
    }
    for done, name in enumerate(names):
        left = end - time.monotonic()
        try:
            sections[name](time.monotonic() + left / (len(names) - done))
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

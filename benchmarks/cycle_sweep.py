"""What whole captured cycles take with other tiles of single products and other cuts of attention.

    python benchmarks/cycle_sweep.py --model 8B --cases ar:1:1,quadratic:4:1 \\
        --variants "" gate_up=16,64,64,2,4 "o=16,16,128,2,8 down=16,16,128,2,8" cut=16,64,64,4,2

Launches overlap, so that a product by itself says little about its part in a cycle. A variant is a
list of ``product=rows,outputs,inputs,warps,stages`` (qkv, o, gate_up or down; for cases in which it
has no more rows than that in all) and ``cut=rows,keys,programs,warps,stages``; nothing: as it is.
"""

from __future__ import annotations

import argparse

import torch
from cycles import Cycles
from random_models import RANK, config

from idlm.engine.graphs import timed
from idlm.model.cuda import paged_attention, projection
from idlm.model.cuda.paged_attention import Cut, cut_of
from idlm.model.cuda.tile import Tile, tile_of

Shape = tuple[int, int]  # outputs and inputs


def shapes(model: str) -> dict[str, Shape]:
    """Of a layer's products, by name."""
    c = config(model)
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    return {
        "qkv": (q + 2 * kv, c.hidden_size),
        "o": (c.hidden_size, q),
        "gate_up": (2 * c.intermediate_size, c.hidden_size),
        "down": (c.hidden_size, c.intermediate_size),
    }


def vary(variant: str, by_name: dict[str, Shape]) -> None:
    """Let tiles and cuts be those of ``variant``."""
    tiles: dict[Shape, Tile] = {}
    cuts: list[Cut] = []
    for part in variant.split():
        name, _, numbers = part.partition("=")
        values = [int(number) for number in numbers.split(",")]
        if name == "cut":
            cuts.append(Cut(*values))
        else:
            tiles[by_name[name]] = Tile(*values)

    def tile(
        parts: tuple[int, ...],
        outputs: int,
        inputs: int,
        modules: tuple[int, ...],
        itemsize: int = 2,
    ) -> Tile:
        found = tiles.get((outputs, inputs))
        if found is not None and sum(parts) <= found.rows:
            return found
        return tile_of(parts, outputs, inputs, modules, itemsize)

    def cut(texts: int, packed: int, dim: int, itemsize: int) -> Cut:
        return cuts[0] if cuts else cut_of(texts, packed, dim, itemsize)

    projection.tile_of, paged_attention.cut_of = tile, cut


@torch.inference_mode()
def main() -> None:
    """Print a line for each variant: microseconds of every case, the least of three means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=RANK, default="135M")
    parser.add_argument("--cases", default="ar:1:1,quadratic:4:1", help="as in graph_profile.py")
    parser.add_argument("--variants", nargs="+", default=[""])
    args = parser.parse_args()
    cycles, by_name = Cycles(args.model), shapes(args.model)
    print(cycles.heading, flush=True)
    for variant in args.variants:
        vary(variant, by_name)
        times = []
        for case in args.cases.split(","):
            graph = cycles.capture(case)
            times.append(f"{case} {min(timed(graph, 10) for _ in range(3)) * 1e6:.0f}")
        print(" | ".join(times), variant or "as it is", flush=True)


if __name__ == "__main__":
    main()

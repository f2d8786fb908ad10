"""Three readings of tokens per forward on the same held-out documents: mean, walk, decoded.

    python benchmarks/walk.py DATA

DATA is a folder of `idlm synthesize`. Greedy documents only, the beginning of their first answers,
the quadratic layout. The mean chain over all places is too high, because forwards start where
drafts fail; the walk (`training/acceptance.py`) follows them and should agree with decoding.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import numpy as np
import torch

from idlm import LLM, SamplingParams, __version__
from idlm.decoding.metrics import DecodeStats
from idlm.model.checkpoint import load_decoder, resolve
from idlm.training.acceptance import STRIDES, walk
from idlm.training.config import ConvertConfig
from idlm.training.data import Batch, Corpus, Document
from idlm.training.lossless import LosslessObjective

BLOCK = max(STRIDES) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--adapter")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=120, help="of each answer")
    args = parser.parse_args()

    llm = LLM(args.model, args.adapter, dtype="float32")
    assert llm.adapter is not None
    print(f"# {llm.device} {platform.processor()}, torch {torch.__version__}, idlm {__version__}")
    print(f"# {' '.join(sys.argv)}")
    # A decoder of its own: `LosslessObjective` compiles the layers that it is given.
    decoder = load_decoder(resolve(args.model), device=llm.device, dtype=torch.float32)
    objective = LosslessObjective(decoder, llm.adapter, ConvertConfig(steps=1, block_size=BLOCK))
    documents = chosen_documents(Corpus.read(args.data, "heldout"), args.documents, args.tokens)
    accepted, anchors = [], []
    for document in documents:
        batch = whole_answer(document, args.tokens).to(llm.device)
        with torch.no_grad():
            accepted.append(objective(batch).agree_BAM.double().cpu())
        anchors.append(batch.anchors_BA.cpu())
    accepted_RAM, anchors_RA = torch.cat(accepted), torch.cat(anchors)
    used_RA = torch.ones_like(anchors_RA, dtype=torch.bool)
    print(f"place 1, mean over all places: {accepted_RAM[..., 0].mean():.3f}")
    for stride in STRIDES:
        part_RAM = accepted_RAM[..., : stride - 1]
        mean = 1 + part_RAM.cumprod(-1).sum(-1).mean()
        outputs = llm.with_layout("quadratic", stride).generate(
            [list(d.token_ids[: d.answers[0][0]]) for d in documents],
            SamplingParams(temperature=0, max_tokens=args.tokens),
        )
        stats = sum((o.stats for o in outputs), DecodeStats())
        print(
            f"N={stride}: mean {mean:.3f}, walk {walk(part_RAM, anchors_RA, used_RA):.3f}, "
            f"decoded {stats.tokens_per_forward:.3f}",
            flush=True,
        )


def chosen_documents(corpus: Corpus, count: int, tokens: int) -> list[Document]:
    """Greedy documents whose first answer is long enough, in a fixed random order."""
    order = np.random.default_rng(0).permutation(np.flatnonzero(corpus.temperatures == 0))
    documents = (corpus.document(int(i)) for i in order)
    long = (d for d in documents if d.answers[0][1] - d.answers[0][0] > tokens + BLOCK + 1)
    return [document for document, _ in zip(long, range(count), strict=False)]


def whole_answer(document: Document, tokens: int) -> Batch:
    """One row with an anchor at every place of the beginning of the first answer."""
    start, end = document.answers[0]
    anchors_1A = torch.arange(start - 1, start - 1 + tokens)[None]
    return Batch(
        torch.tensor(document.token_ids[:end])[None],
        torch.arange(end)[None],
        torch.zeros(1, end, dtype=torch.int64),
        torch.arange(end)[None] >= start,
        anchors_1A,
        torch.full_like(anchors_1A, BLOCK),
    )


if __name__ == "__main__":
    main()

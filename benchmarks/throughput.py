"""Tokens per second at many concurrencies: autoregression, fixed strides, and what `auto` chooses.

    python benchmarks/throughput.py --output results            # the default model, real acceptance
    python benchmarks/throughput.py --model 8B --output results # random weights, imposed acceptance

A fixed number of requests runs at any time; one that ends is replaced by the next. What is counted
is what arrives in a window of time in which the batch is full. Prints hardware, versions and the
command; writes a table (Markdown), JSON and a plot into the output folder. ``8B`` has the shape of
Qwen3-8B and random weights; since such a model accepts nothing, drafts stand by a coin of the
stated rates instead, and all else is as it is.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from itertools import cycle as cycle_without_end
from pathlib import Path
from random import Random
from typing import Any

import torch
from random_models import DEVICE, DTYPE, bandwidth, random_model

from idlm import LLM, SamplingParams, __version__
from idlm.decoding import cycle
from idlm.decoding.cycle import Method
from idlm.decoding.layout import Layout
from idlm.decoding.metrics import DecodeStats
from idlm.decoding.policy import Policy, plans
from idlm.decoding.random import Stream, uniform
from idlm.decoding.sampling import Sampling
from idlm.decoding.verify import Drafts, Verdict, _leading, verify
from idlm.engine.engine import Engine
from idlm.engine.kv_cache import KVCache
from idlm.engine.request import Request
from idlm.model.adapter import Adapter
from idlm.model.decoder import Decoder

PROMPTS = (
    "Explain in simple words how a refrigerator works.",
    "Write a short story about a lighthouse keeper.",
    "List five tips for learning a new language.",
    "What are the main differences between cats and dogs?",
    "Write a Python function that reverses a list.",
    "Describe the water cycle for a child.",
    "Give me a recipe for pancakes.",
    "Summarize the plot of Romeo and Juliet.",
)
WINDOWS = 3  # at most, until there is one in which nothing was captured
IMPOSED = (0.83, 0.78, 0.75, 0.72, 0.70, 0.68, 0.66)  # chance that place 1, 2, ... stands


@dataclass
class Subject:
    """A model to be measured; makes an engine for each plan."""

    llm: LLM
    own: tuple[Decoder, Adapter, KVCache] | None = None

    def engine(self, plan: str, concurrency: int) -> Engine:
        """An engine for ``ar``, ``linear:4``, ``quadratic:4``, ``auto`` ..."""
        name, _, stride = plan.partition(":")
        if self.own is None:
            method, cache = self.llm._method, self.llm._cache
        else:
            decoder, adapter, cache = self.own
            method = Method(decoder, adapter, Layout.named("quadratic", 4), "coupled")
        policy = None
        if plan == "auto":
            policy = Policy(plans(method.adapter.config.block_size if method.adapter else 0))
        else:
            layout = Layout.named(name, int(stride or 1))
            method = replace(
                method, layout=layout, adapter=method.adapter if layout.num_masks else None
            )
        return Engine(
            method,
            self.llm.tokenizer,
            cache=cache,
            device=self.llm.device,
            max_batch=concurrency,
            policy=policy,
        )


def impose(rates: tuple[float, ...]) -> None:
    """Let drafts stand by a coin, in place of the rule, which still chooses the next token."""
    places = {}

    def imposed(
        rule: str,
        logits_BNV: torch.Tensor,
        drafts: Drafts,
        position_B: torch.Tensor,
        sampling: Sampling,
    ) -> Verdict:
        verdict = verify(rule, logits_BNV, drafts, position_B, sampling)
        M = drafts.tokens_BM.shape[1]
        if M not in places:
            places[M] = torch.tensor(rates[:M], device=logits_BNV.device)
        place_M = torch.arange(M, device=logits_BNV.device)
        u_BM = uniform(sampling.seed_B[:, None], position_B[:, None] + place_M, Stream.ACCEPT)
        accepted_B = _leading(u_BM < places[M], drafts.count_B)
        return Verdict(accepted_B, verdict.next_B, verdict.overlap_BM)

    cycle.verify = imposed


def prompts(llm: LLM, file: Path | None, length: int | None) -> Iterator[list[int]]:
    """Prompts without end: lines of ``file``, or questions; made ``length`` tokens long."""
    texts = file.read_text().splitlines() if file else list(PROMPTS)
    prompts = []
    for text in texts:
        ids = llm.tokenizer.apply_chat_template([{"role": "user", "content": text}])
        if length is not None:
            ids = ((ids[:-8] * (length // len(ids) + 1))[: length - 8] + ids[-8:])[:length]
        prompts.append(ids)
    # Made beforehand: to tokenise is the server's work, and not of this thread.
    return cycle_without_end(prompts)


def measure(
    engine: Engine,
    source: Iterator[list[int]],
    concurrency: int,
    params: dict[str, Any],
    spread: float,
    seconds: float,
) -> dict[str, Any]:
    """Run ``concurrency`` requests at a time, and look at a window of ``seconds``.

    Answers of one length end together without drafts, and the prompts after them are read together;
    ``spread`` is the share of ``max_tokens`` by which they differ at most, either way.
    """
    alive: list[Request] = []
    ended: list[Request] = []
    silent: list[Request] = []  # those that nothing has come of yet
    first: dict[int, float] = {}
    last: dict[int, float] = {}
    seeds, lengths, most = count(), Random(0), params["max_tokens"]

    def step() -> None:
        while len(alive) < concurrency:
            length = max(1, round(most * (1 + spread * lengths.uniform(-1, 1))))
            own = SamplingParams(seed=next(seeds), **params | {"max_tokens": length})
            alive.append(engine.add(next(source), own))
            silent.append(alive[-1])
        engine.step()
        now = time.perf_counter()
        for request in list(silent):
            if request.token_ids:
                first[request.id] = now
                silent.remove(request)
        for request in [request for request in alive if request.finished]:
            if request.error is not None:
                raise request.error
            alive.remove(request)
            ended.append(request)
            last[request.id] = now

    def tokens() -> int:
        return sum(len(r.token_ids) for r in (*alive, *ended))

    limit = time.perf_counter() + 20 * seconds + 30
    step()
    while time.perf_counter() < limit and not all(r.token_ids for r in alive):
        step()
    # Graphs are captured when they are first needed: not in the window that counts.
    calm = time.perf_counter() + seconds
    captured = _captured(engine)
    while time.perf_counter() < limit and (time.perf_counter() < calm or len(ended) < len(PROMPTS)):
        step()
        if _captured(engine) != captured:
            captured, calm = _captured(engine), time.perf_counter() + seconds
    for _ in range(WINDOWS):
        ended.clear()
        captured = _captured(engine)
        before, waited, start, steps = tokens(), engine.stats.waited, time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            step()
            steps += 1
        torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
        if _captured(engine) == captured:
            break
    stats = sum((r.stats for r in (*alive, *ended)), DecodeStats())
    made = sum(len(r.token_ids) for r in (*alive, *ended))
    tpf = made / max(stats.forwards, 1)
    ttft = [first[r.id] - r.started for r in ended if r.id in first]
    tpot = [
        (last[r.id] - first[r.id]) / (len(r.token_ids) - 1) for r in ended if len(r.token_ids) > 1
    ]
    line = {
        "tokens_per_second": (tokens() - before) / elapsed,
        "tpf": tpf,
        "acceptance_by_place": stats.acceptance_by_place,
        "compute_efficiency": tpf**2 * stats.forwards / max(stats.rows, 1),
        "ms_per_step": elapsed / steps * 1e3,
        "host_share": 1 - (engine.stats.waited - waited) / elapsed,
        "weight_gigabytes_per_second": _weight_bytes(engine) * steps / elapsed / 1e9,
        "ttft_ms_p50": _percentile(ttft, 0.5),
        "ttft_ms_p95": _percentile(ttft, 0.95),
        "tpot_ms_p50": _percentile(tpot, 0.5),
        "tpot_ms_p95": _percentile(tpot, 0.95),
        "plans": engine.stats.plans,
        "graphs_ms": _graphs_ms(engine),
        "captured_in_window": _captured(engine) - captured,
        "tpot_ms": elapsed * concurrency / (tokens() - before) * 1e3,
    }
    for request in alive:
        engine.abort(request)
    engine.close()
    return line


def _percentile(seconds: list[float], share: float) -> float | None:
    """Milliseconds that ``share`` of them do not exceed; None of nothing."""
    return sorted(seconds)[int(len(seconds) * share)] * 1e3 if seconds else None


def _weight_bytes(engine: Engine) -> int:
    """What a cycle reads of the base model's weights, however many rows it has."""
    decoder = engine.method.decoder
    apart = 0 if decoder.config.tie_word_embeddings else decoder.embed.weight.nbytes
    return sum(parameter.nbytes for parameter in decoder.parameters()) - apart


def _graphs_ms(engine: Engine) -> dict[str, float]:
    """What the captured cycles take on the device, by requests (or prompts) and layout."""
    graphs = engine._runner._graphs
    found = graphs._graphs.items() if graphs else ()
    return {_label(key): graph.seconds * 1e3 for key, graph in found}


def _label(key: Any) -> str:
    """What a captured graph is called in a table."""
    plan = f"{key[-1].name} {key[-1].stride}"
    if key[0] == "prefill":
        return f"prefill {key[1]} x {key[2]}, {plan}"
    if key[0] == "with prompts":
        return f"{key[1]}, {plan}, with {key[2]} rows of prompts"
    return f"{key[0]}, {plan}"


def _captured(engine: Engine) -> int:
    graphs = engine._runner._graphs
    return 0 if graphs is None else len(graphs._graphs)


def table(lines: list[dict[str, Any]]) -> str:
    """Markdown: tokens per second, times autoregression, TPF; a row for each concurrency."""
    names = list(dict.fromkeys(line["plan"] for line in lines))
    rows = [["requests", *names], ["---:"] * (1 + len(names))]
    by = {(line["concurrency"], line["plan"]): line for line in lines if "tpf" in line}
    for concurrency in dict.fromkeys(line["concurrency"] for line in lines):
        base = by.get((concurrency, "ar"))
        row = [str(concurrency)]
        for plan in names:
            line = by.get((concurrency, plan))
            if line is None:
                row.append("")
                continue
            times = line["tokens_per_second"] / base["tokens_per_second"] if base else 0
            row.append(
                f"{line['tokens_per_second']:.0f} ({times:.2f}x, TPF {line['tpf']:.2f}, "
                f"{line['ms_per_step']:.2f} ms, host {line['host_share']:.0%})"
            )
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(lines: list[dict[str, Any]], title: str, path: Path) -> None:
    """Tokens per second over concurrency, with what they are of autoregression's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    by = {(line["plan"], line["concurrency"]): line["tokens_per_second"] for line in lines}
    concurrencies = sorted({line["concurrency"] for line in lines})
    for plan in dict.fromkeys(line["plan"] for line in lines):
        there = [n for n in concurrencies if (plan, n) in by]
        axes.plot(there, [by[plan, n] for n in there], marker="o", label=plan)
        for n in there if plan == "auto" else ():
            if ("ar", n) in by:
                times, place = f"{by[plan, n] / by['ar', n]:.2f}x", (n, by[plan, n])
                axes.annotate(times, place, (0, 7), textcoords="offset points", ha="center")
    axes.set(xscale="log", yscale="log", xlabel="concurrent requests", ylabel="tokens per second")
    axes.set_xticks(concurrencies, [str(n) for n in concurrencies], minor=False)
    axes.set_xticks([], minor=True)
    axes.margins(y=0.1)
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a folder; 8B: random weights; default: the default model")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--tokenizer", help="for 8B: a model whose tokenizer is used")
    parser.add_argument("--plans", default="ar,quadratic:4,auto")
    parser.add_argument("--concurrency", default="1,8,32,64,128,256")
    parser.add_argument("--prompts", type=Path, help="one prompt a line")
    parser.add_argument("--prompt-tokens", type=int, help="default: as long as they are")
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument(
        "--spread", type=float, default=0.0, help="answers are up to this share longer or shorter"
    )
    parser.add_argument(
        "--prefill",
        choices=("along", "beside"),
        help="default: along with cycles of large models",
    )
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--window", type=float, default=1.0, help="seconds that are counted")
    parser.add_argument("--seconds", type=float, default=240, help="begin nothing new after")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    args.output.mkdir(parents=True, exist_ok=True)
    copied, _ = bandwidth()
    torch.cuda.empty_cache()
    if args.model == "8B":
        lender = LLM(args.tokenizer, "none", layout="ar", stride=1, kv_cache_tokens=64)
        decoder, adapter = random_model("8B")
        cache = KVCache(decoder.config, DEVICE, DTYPE, 300_000, wanted=0)
        subject = Subject(lender, (decoder, adapter, cache))
        impose(IMPOSED)
    else:
        subject = Subject(
            LLM(args.model, args.adapter, kv_cache_tokens=600_000, verification="coupled")
        )
    gc.collect()
    gc.freeze()  # as `idlm serve` does
    name = args.model or "default model"
    label = f"{name} on {torch.cuda.get_device_name()}"
    if subject.own is not None:
        label += f", random weights, acceptance imposed: {', '.join(map(str, IMPOSED))}"
    params = {"temperature": args.temperature, "max_tokens": args.output_tokens}
    params["ignore_eos"] = True
    lines: list[dict[str, Any]] = []
    print(f"# {label}, torch {torch.__version__}, idlm {__version__}")
    print("#", " ".join(sys.argv))
    print(f"# {params}; a large copy: {copied:.0f} GB/s", flush=True)
    for concurrency in map(int, args.concurrency.split(",")):
        for plan in args.plans.split(","):
            if time.monotonic() > end:
                break
            line: dict[str, Any] = {"plan": plan, "concurrency": concurrency}
            began = time.monotonic()
            try:
                source = prompts(subject.llm, args.prompts, args.prompt_tokens)
                engine = subject.engine(plan, concurrency)
                if args.prefill:
                    engine._runner.along = args.prefill == "along"
                line |= measure(engine, source, concurrency, params, args.spread, args.window)
            except Exception:
                traceback.print_exc()
                continue
            lines.append(line)
            short = {k: round(v, 3) for k, v in line.items() if isinstance(v, float)}
            print(
                plan,
                concurrency,
                short,
                line["plans"],
                {name: round(ms, 3) for name, ms in line["graphs_ms"].items()},
                f"took {time.monotonic() - began:.1f} s",
                flush=True,
            )
            tag = "8b" if subject.own else "default"
            found = {"label": label, "params": params, "copy_gbps": copied, "lines": lines}
            (args.output / f"throughput_{tag}.json").write_text(json.dumps(found, indent=1))
    print(table(lines))
    (args.output / f"throughput_{tag}.md").write_text(f"{label}\n\n{table(lines)}\n")
    plot(lines, label, args.output / f"throughput_{tag}.png")


if __name__ == "__main__":
    main()

"""What a full conversion costs in quality: exact answers before and after, at equal data.

    pip install reasoning-gym==0.1.25      # makes the tasks, where there is no file of them yet
    python benchmarks/full_quality.py --tasks tasks.jsonl.xz --output OUT

1. Procedural tasks with one right answer each; no question is both trained on and tested.
2. `tuned`: the model, fine-tuned on them autoregressively.
3. `converted`: `tuned` as a full I-DLM; `further`: `tuned` with as many more AR steps, on the very
   same batches. Both have the same rate and schedule.
4. Greedy accuracy of each, decoded autoregressively; of `converted` also in the layouts of stride
   4, with tokens per forward. Differences are paired, with their standard errors.

AR steps are those of the full objective with a weight of the clean rows that leaves nothing of the
masks' loss. A process of its own evaluates what is there while the next model is trained. OUT gets
the models, a JSON file for every part and `full_quality.json`; the same command does what is not
done yet.
"""

from __future__ import annotations

import argparse
import gc
import json
import lzma
import math
import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from idlm import LLM, SamplingParams, __version__
from idlm.decoding.metrics import DecodeStats
from idlm.errors import InvalidRequestError
from idlm.llm import RequestOutput
from idlm.model.checkpoint import load_config, load_decoder, resolve
from idlm.model.files import replacing, write_json
from idlm.model.tokenizer import Tokenizer
from idlm.training.config import ConvertConfig
from idlm.training.conversion import FullConversion
from idlm.training.corpus_reader import read_corpus
from idlm.training.data import Corpus
from idlm.training.full import mask_token
from idlm.training.parallel import torchrun
from idlm.training.trainer import Trainer

# Tasks of reasoning-gym that a small model learns in part, and how long theirs are made.
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "max_digits": 3},
    "complex_arithmetic": {},
    "decimal_chain_sum": {"max_terms": 2, "max_digits": 2, "max_decimal_places": 2},
    "letter_counting": {},
    "number_filtering": {"max_numbers": 8, "max_decimals": 2},
    "number_sorting": {"max_numbers": 7, "max_decimals": 1},
    "rotate_matrix": {"max_n": 5},
    "spell_backward": {"min_word_len": 4, "max_word_len": 7},
    "word_sequence_reversal": {},
    "word_sorting": {"max_words": 7},
}
# Of the masks' loss a millionth is left. AdamW does not mind the scale, and the limit of the norm
# goes with it.
AUTOREGRESSIVE = {"block_size": 1, "curriculum": 0.0, "clean_weight": 1e6, "clip": 1e6}
LAYOUTS = (("ar", 1), ("linear", 4), ("quadratic", 4))
Data = tuple[Corpus, Corpus]


@dataclass(frozen=True)
class Item:
    """A question with its one right answer."""

    task: str
    split: str
    question: str
    answer: str


def main() -> None:
    """Do what is not done yet and print the tables."""
    args = parse()
    items = tasks(args)
    args.output.mkdir(parents=True, exist_ok=True)
    test = [item for item in items if item.split == "test"]
    trainings: dict[str, dict[str, Any]] = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with (
        torchrun(device),
        ProcessPoolExecutor(1, mp_context=get_context("spawn")) as evaluator,
    ):
        base, tuned = resolve(args.model), args.output / "tuned"
        evaluations = [evaluator.submit(evaluate, "base", base, test, args)]
        data = read_data(items, base, args)
        for name, source, limits in (
            ("tuned", base, {"steps": args.tune_steps, "minutes": args.tune_minutes}),
            ("converted", tuned, {"steps": args.steps, "minutes": args.minutes}),
            ("further", tuned, {}),
        ):
            if name == "further":
                limits = {"steps": trainings["converted"]["steps"]}
            trainings[name] = train(name, source, data, limits, device, args)
            folder = args.output / name
            evaluations.append(evaluator.submit(evaluate, name, folder, test, args))
        results = [result for future in evaluations for result in future.result()]
    report = {
        **circumstances(),
        "items": {s: Counter(x.task for x in items if x.split == s) for s in ("train", "test")},
        "trainings": trainings,
        "results": results,
    }
    write_json(args.output / "full_quality.json", report)
    print_tables(report)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", help="folder, GGUF file or hub id (default: the default model)")
    add("--tasks", type=Path, required=True, help="items, .jsonl.xz; made if there is no such file")
    add("--output", type=Path, help="folder for the models and full_quality.json")
    add("--train-items", type=int, default=5000, help="per task, if made (default: 5000)")
    add("--test-items", type=int, default=400, help="per task, if made (default: 400)")
    add("--tune-steps", type=int, default=600, help="of the fine-tuning (default: 600)")
    add("--tune-minutes", type=float, default=1.1, help="the most it may take (default: 1.1)")
    add("--tune-lr", type=float, default=5e-4, help="its learning rate (default: 5e-4)")
    add("--steps", type=int, default=600, help="of conversion and further AR (default: 600)")
    add("--minutes", type=float, default=2.2, help="the most that conversion takes (default: 2.2)")
    add("--lr", type=float, default=3e-4, help="learning rate of both (default: 3e-4)")
    add("--batch", type=int, default=16, help="rows per step (default: 16)")
    add("--length", type=int, default=1024, help="tokens per row (default: 1024)")
    add("--anchors", type=int, default=128, help="mask blocks per row (default: 128)")
    add("--mask-token", default="<jupyter_script>", help="token given up (default: %(default)s)")
    add("--requests", type=int, default=256, help="at once, in evaluation (default: 256)")
    args = parser.parse_args()
    if args.output is None and args.tasks.exists():
        parser.error("--output is missing; only tasks that are still to be made need none")
    return args


def tasks(args: argparse.Namespace) -> list[Item]:
    """All items; made and written if the file is not there."""
    if not args.tasks.exists():
        items = [item for name in TASKS for item in make(name, args.train_items, args.test_items)]
        lines = "".join(json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
        with replacing(args.tasks) as temporary:
            temporary.write_bytes(lzma.compress(lines.encode(), preset=9))
        print(f"{len(items)} items in {args.tasks}: {args.tasks.stat().st_size / 1e6:.2f} MB")
    if args.output is None:
        raise SystemExit(0)
    with lzma.open(args.tasks, "rt", encoding="utf-8") as file:
        return [Item(**json.loads(line)) for line in file]


def make(name: str, train: int, test: int) -> Iterator[Item]:
    """Items of one task, no question twice; those of the test first."""
    from reasoning_gym import create_dataset

    dataset = create_dataset(name, seed=0, size=4 * (train + test), **TASKS[name])
    seen: set[str] = set()
    for entry in dataset:
        if entry["question"] in seen:
            continue
        split = "test" if len(seen) < test else "train"
        seen.add(entry["question"])
        yield Item(name, split, entry["question"].strip(), entry["answer"].strip())
        if len(seen) == train + test:
            return
    raise InvalidRequestError(
        f"{name} has {len(seen)} questions only, not {train + test}; lower --train-items."
    )


def read_data(items: list[Item], model: Path, args: argparse.Namespace) -> Data:
    """Documents to train on and a few held-out ones, by way of chat JSONL like a user's."""
    path = args.output / "train.jsonl"
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for item in items:
            if item.split == "train":
                messages = [
                    {"role": "user", "content": item.question},
                    {"role": "assistant", "content": item.answer},
                ]
                file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    train, heldout, counts = read_corpus(
        path,
        Tokenizer.load(model),
        length=args.length,
        vocab_size=load_config(model).vocab_size,
    )
    print(dict(counts), file=sys.stderr, flush=True)
    return train, heldout


def train(
    name: str,
    source: Path,
    data: Data,
    limits: dict[str, Any],
    device: torch.device,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Train the model ``name`` from the one in ``source``; what became of it."""
    facts = args.output / f"train_{name}.json"
    if facts.exists():
        return read_json(facts)
    print(f"== {name}", file=sys.stderr, flush=True)
    began = time.monotonic()
    settings = {
        **{"kind": "full", "batch": args.batch, "length": args.length, "anchors": args.anchors},
        **{"eval_rows": args.batch, "eval_every": 10**9, "save_every": 10**9},
        **({"lr": args.tune_lr, "seed": 0} if name == "tuned" else {"lr": args.lr, "seed": 1}),
        **({} if name == "converted" else AUTOREGRESSIVE),
        **limits,
    }
    config = ConvertConfig.read(None, settings)
    # What the model before left on the device.
    gc.collect()
    decoder = load_decoder(source, device=device, dtype=torch.float32)
    conversion = FullConversion(
        decoder,
        config,
        name,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
        mask_token_id=mask_token(decoder.config, Tokenizer.load(source), args.mask_token),
        source=source,
    )
    # Without a folder of its own the trainer keeps nothing: here the last weights count, not those
    # that draft best.
    outcome = Trainer(conversion, *data, config, None).run()
    if outcome is None:
        raise KeyboardInterrupt
    conversion.save(args.output / name)
    done = {
        "settings": settings,
        "steps": outcome.progress.step,
        "seconds": outcome.progress.seconds,
        "startup_seconds": outcome.progress.startup,
        "whole_seconds": time.monotonic() - began,
        "tokens": outcome.progress.step * config.batch * config.length,
        "documents": len(data[0]),
        "acceptance": outcome.best.acceptance.to_dict(),
    }
    write_json(facts, done)
    return done


def evaluate(
    name: str, folder: Path, items: list[Item], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Greedy answers of the model in ``folder``, one result per layout, AR first."""
    path = args.output / f"eval_{name}.json"
    if path.exists():
        done: list[dict[str, Any]] = read_json(path)["results"]
        return done
    llm = LLM(
        folder,
        "none" if name == "base" else None,
        layout="ar",
        stride=1,
        max_batch=args.requests,
        # More than any item has, so that all requests run at once.
        kv_cache_tokens=1024 * args.requests,
    )
    chats = [[{"role": "user", "content": item.question}] for item in items]
    params = SamplingParams(temperature=0.0, max_tokens=128)
    results = []
    plain: list[list[int]] = []
    for layout, stride in LAYOUTS if name == "converted" else LAYOUTS[:1]:
        began = time.monotonic()
        outputs = llm.with_layout(layout, stride).chat(chats, params)
        seconds = time.monotonic() - began
        plain = plain or [x.token_ids for x in outputs]
        right = [x.text.strip() == i.answer for x, i in zip(outputs, items, strict=True)]
        by_task = {}
        for task in TASKS:
            own = [n for n, item in enumerate(items) if item.task == task]
            by_task[task] = {
                "accuracy": fmean(right[n] for n in own),
                "tokens_per_forward": tokens_per_forward([outputs[n] for n in own]),
            }
        result = {
            "model": name,
            "layout": layout,
            "stride": stride,
            "accuracy": fmean(right),
            "tokens_per_forward": tokens_per_forward(outputs),
            "same_as_ar": fmean(x.token_ids == y for x, y in zip(outputs, plain, strict=True)),
            "seconds": seconds,
            "by_task": by_task,
            "right": "".join("01"[r] for r in right),
        }
        results.append(result)
        show(result)
    write_json(path, {"results": results})
    return results


def tokens_per_forward(outputs: list[RequestOutput]) -> float:
    """Of all requests together."""
    return sum((x.stats for x in outputs), DecodeStats()).tokens_per_forward


def read_json(path: Path) -> Any:
    """What a part left."""
    return json.loads(path.read_text())


def circumstances() -> dict[str, str]:
    """Hardware, versions and command."""
    on_gpu = torch.cuda.is_available()
    return {
        "hardware": torch.cuda.get_device_name() if on_gpu else platform.processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "idlm": __version__,
        "command": shlex.join(sys.argv),
    }


def show(result: dict[str, Any]) -> None:
    """One line as soon as it is known."""
    print(
        f"{result['model']:10s} {result['layout']:9s} N={result['stride']}  "
        f"accuracy {100 * result['accuracy']:.2f}%  TPF {result['tokens_per_forward']:.3f}  "
        f"as AR {100 * result['same_as_ar']:.1f}%  {result['seconds']:.1f} s",
        flush=True,
    )


def print_tables(report: dict[str, Any]) -> None:
    """Markdown, for docs/benchmarks.md."""
    print(" | ".join(f"{key}: {report[key]}" for key in circumstances()))
    for name, done in report["trainings"].items():
        print(
            f"{name}: {done['steps']} steps, {done['tokens'] / 1e6:.1f}M tokens, "
            f"{done['seconds']:.0f} s (+ {done['startup_seconds']:.0f} s for the first step)"
        )
    results = report["results"]
    against = {r["model"]: r for r in results if r["layout"] == "ar"}
    names = list(results[0]["by_task"])
    print("| model | layout | accuracy % | minus further, points | TPF | text as AR's % |")
    print("| --- | --- |" + " ---: |" * 4)
    for r in results:
        difference, error = paired(r["right"], against["further"]["right"])
        print(
            f"| {r['model']} | {r['layout']} N={r['stride']} | {100 * r['accuracy']:.2f} | "
            f"{100 * difference:+.2f} ± {100 * error:.2f} | {r['tokens_per_forward']:.3f} | "
            f"{100 * r['same_as_ar']:.1f} |"
        )
    print(
        "| accuracy %; TPF | " + " | ".join(f"{r['model']} {r['layout']}" for r in results) + " |"
    )
    print("| --- |" + " ---: |" * len(results))
    for name in names:
        cells = [r["by_task"][name] for r in results]
        texts = [f"{100 * c['accuracy']:.1f}; {c['tokens_per_forward']:.2f}" for c in cells]
        print(f"| {name} | " + " | ".join(texts) + " |")


def paired(a: str, b: str) -> tuple[float, float]:
    """Mean of the differences of two rows of zeros and ones, and its standard error."""
    differences = [int(x) - int(y) for x, y in zip(a, b, strict=True)]
    return fmean(differences), stdev(differences) / math.sqrt(len(differences))


if __name__ == "__main__":
    main()

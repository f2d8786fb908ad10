"""Prompts that people wrote, for `idlm synthesize --prompts`: those of the shipped adapter.

    pip download --no-deps --no-binary :all: bigbench==1.0.0
    pip download --no-deps nvidia-bfcl==26.3
    python benchmarks/human_prompts.py bigbench-1.0.0.tar.gz nvidia_bfcl-26.3-*.whl -o prompts.jsonl

Questions of BIG-bench's JSON tasks and of the Berkeley function calling leaderboard (both
Apache-2.0), without their answers. None of MT-bench's.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from idlm.model.files import replacing

PER_TASK = 150
# Of prompts that begin with the same letters; else a few templates would outweigh all else.
PER_BEGINNING, BEGINNING = 120, 16
LENGTH = range(20, 901)
TASK_BYTES = 20_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bigbench", type=Path)
    parser.add_argument("bfcl", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    draw = random.Random(0)
    prompts = list(dict.fromkeys([*bigbench(args.bigbench, draw), *bfcl(args.bfcl)]))
    draw.shuffle(prompts)
    random.Random(0).shuffle(prompts)
    kept = list(balanced(prompts))
    with replacing(args.output) as temporary:
        temporary.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in kept))
    print(f"{len(kept)} prompts in {args.output}")


def bigbench(path: Path, draw: random.Random) -> Iterator[str]:
    """Inputs of the JSON tasks, half of them with the task's own instruction before."""
    with tarfile.open(path) as archive:
        for member in archive:
            if not member.name.endswith("/task.json") or member.size > TASK_BYTES:
                continue
            file = archive.extractfile(member)
            assert file is not None
            task: dict[str, Any] = json.load(file)
            examples = task.get("examples") or []
            draw.shuffle(examples)
            count = 0
            for example in examples:
                text = example.get("input")
                if not isinstance(text, str):
                    continue
                instruction = task.get("task_prefix") or ""
                prompt = (instruction + text if draw.random() < 0.5 else text).strip()
                if len(prompt) not in LENGTH or not is_english(prompt) or not is_text(prompt):
                    continue
                yield prompt
                count += 1
                if count >= PER_TASK:
                    break


def bfcl(path: Path) -> Iterator[str]:
    """The questions, without the functions that could be called."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if "/data/BFCL" not in name or not name.endswith(".json") or "possible_answer" in name:
                continue
            for line in archive.read(name).decode().splitlines():
                try:
                    turn = json.loads(line)["question"][0]
                    prompt = (turn[-1] if isinstance(turn, list) else turn)["content"]
                except (ValueError, KeyError, IndexError, TypeError):
                    continue
                if len(prompt) in LENGTH and is_english(prompt):
                    yield prompt.strip()


def balanced(prompts: list[str]) -> Iterator[str]:
    """At most so many prompts that begin alike."""
    counts: Counter[str] = Counter()
    for prompt in prompts:
        beginning = re.sub(r"[^a-z]", "", prompt.lower())[:BEGINNING]
        if is_english(prompt) and counts[beginning] < PER_BEGINNING:
            counts[beginning] += 1
            yield prompt


def is_english(text: str) -> bool:
    """Whether nearly all characters are ASCII."""
    return sum(map(str.isascii, text)) >= 0.97 * len(text)


def is_text(text: str) -> bool:
    """Whether most characters are letters or spaces."""
    return sum(c.isalpha() or c == " " for c in text) >= 0.7 * len(text)


if __name__ == "__main__":
    main()

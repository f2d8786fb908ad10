"""Instructions for `idlm synthesize --prompts`: many kinds of task, far more subjects.

    pip install reasoning-gym==0.1.25
    python benchmarks/instruction_prompts.py --count 60000 -o instructions.jsonl

Templates of ours (``instruction_prompts.yaml``) filled with subjects at random, procedural tasks of
reasoning-gym (Apache-2.0), and functions and prose of Python's standard library to explain, correct
or shorten. No benchmark's questions are among them: give their files by ``--exclude`` to have that
checked.
"""

from __future__ import annotations

import argparse
import inspect
import json
import pkgutil
import random
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import reasoning_gym
import yaml
from reasoning_gym.factory import DATASETS

from idlm.model.files import replacing

SHARES = {"templates": 0.85, "code": 0.05, "prose": 0.05, "reasoning": 0.05}
LONGEST = 1600  # characters of a prompt
OVERLAP = 8  # words in a row that no prompt may share with an excluded file
# Of the standard library, what does more than to define something when it is imported.
UNSAFE = {"antigravity", "this", "idlelib", "turtledemo", "turtle", "test", "lib2to3", "tkinter"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="JSONL of questions")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    draw = random.Random(0)
    texts = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text("utf-8"))
    functions, passages = list(standard_functions()), list(standard_prose())
    makers: dict[str, Callable[[], str]] = {
        "templates": lambda: template_prompt(texts, draw),
        "code": lambda: about(draw.choice(functions), texts["about_code"], texts, draw),
        "prose": lambda: about(draw.choice(passages), texts["about_prose"], texts, draw),
        "reasoning": reasoning_prompts(draw).__next__,
    }
    forbidden = {run for path in args.exclude for run in word_runs(path.read_text("utf-8"))}
    prompts: dict[str, str] = {}
    shared = 0
    while len(prompts) < args.count:
        (kind,) = draw.choices(list(SHARES), list(SHARES.values()))
        prompt = makers[kind]()
        if not forbidden.isdisjoint(word_runs(prompt)):
            shared += 1
        elif len(prompt) <= LONGEST:
            prompts[prompt] = kind
    with replacing(args.output) as path:
        path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts), "utf-8")
    print(f"{len(prompts)} prompts {dict(Counter(prompts.values()))}; {shared} left out: excluded")


def template_prompt(texts: dict[str, Any], draw: random.Random) -> str:
    """An instruction, with a word before or after it now and then."""
    text = draw.choice(draw.choice(list(texts["templates"].values())))
    if draw.random() < 0.35:
        text = f"{text} {draw.choice(texts['after'])}"
    if draw.random() < 0.15:
        text = draw.choice(texts["before"]) + text
    return filled(text, texts, draw)


def about(passage: str, asks: list[str], texts: dict[str, Any], draw: random.Random) -> str:
    """An instruction about ``passage``, which stands at its ``{}``."""
    return filled(draw.choice(asks), texts, draw).replace("{}", passage)


def filled(template: str, texts: dict[str, Any], draw: random.Random) -> str:
    """``template`` with subjects in its slots."""
    return re.sub(r"\{(\w+)\}", lambda found: str(draw.choice(texts["slots"][found[1]])), template)


def reasoning_prompts(draw: random.Random) -> Iterator[str]:
    """Questions of all tasks of reasoning-gym that are short enough, one task after another."""
    names = sorted(DATASETS)
    while True:
        for name in draw.sample(names, len(names)):
            seed = draw.randrange(1 << 30)
            try:
                question = reasoning_gym.create_dataset(name, size=1, seed=seed)[0]["question"]
            except Exception as error:  # a few need other packages or larger sizes
                print(f"{name}: {error}", file=sys.stderr)
                names.remove(name)
                continue
            if len(question) <= LONGEST:
                yield question


def standard_functions() -> Iterator[str]:
    """Sources of short functions of the standard library, without comments before them."""
    for module in standard_modules():
        for _, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ != module.__name__:
                continue
            try:
                source = inspect.getsource(function)
            except (OSError, TypeError):
                continue
            if 120 <= len(source) <= 1200:
                yield source.rstrip()


def standard_prose() -> Iterator[str]:
    """Paragraphs of the standard library's documentation strings."""
    for module in standard_modules():
        members = [module, *(m for _, m in inspect.getmembers(module, inspect.isclass))]
        for member in members:
            for paragraph in (inspect.getdoc(member) or "").split("\n\n"):
                prose = " ".join(paragraph.split())
                if 200 <= len(prose) <= 1200 and prose.count("--") < 3 and ">>>" not in prose:
                    yield prose


def standard_modules() -> Iterator[types.ModuleType]:
    """Those that can be imported here."""
    for info in pkgutil.iter_modules([str(Path(inspect.__file__).parent)]):
        if info.name.startswith("_") or info.name in UNSAFE:
            continue
        try:
            yield import_module(info.name)
        except Exception as error:
            print(f"{info.name}: {error}", file=sys.stderr)


def word_runs(text: str) -> set[tuple[str, ...]]:
    """All runs of `OVERLAP` words."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + OVERLAP]) for i in range(len(words) - OVERLAP + 1)}


if __name__ == "__main__":
    main()

"""The default model and its adapter with heads of zeros added, so that 2 or 4 GPUs can share them.

    python benchmarks/pad_heads.py FOLDER

writes FOLDER/model and FOLDER/adapter (--model SOURCE: where the default model cannot be fetched,
a folder with it). Heads whose weights are zeros add nothing: the model says
what it said with its 9 heads (3 of keys and values), which tensor parallelism cannot divide by 2.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from idlm.llm import DEFAULT_ADAPTER
from idlm.model.adapter import CONFIG_FILE, LORA_FILE
from idlm.model.checkpoint import load_config, resolve
from idlm.model.files import write_json, write_safetensors

WEIGHTS = "model.safetensors"
SHARED_HEADS = 4  # of keys and values


@dataclass(frozen=True)
class Heads:
    """Widths of queries, and of keys and values, over all heads."""

    query: int
    shared: int

    def pad(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a model or of a LoRA, widened to these heads by zeros at the end."""
        rows = {"q_proj": self.query, "k_proj": self.shared, "v_proj": self.shared}
        padded = dict(tensors)
        for name, tensor in tensors.items():
            module = next((part for part in name.split(".") if part.endswith("_proj")), "")
            if module in rows and "lora_A" not in name:
                padded[name] = F.pad(tensor, (0, 0, 0, rows[module] - len(tensor)))
            elif module == "o_proj" and "lora_B" not in name:
                padded[name] = F.pad(tensor, (0, self.query - tensor.shape[1]))
        return padded


def pad_default_model(folder: Path, source: Path) -> tuple[Path, Path]:
    """Write the model in ``source`` and its adapter with more heads; the folders of both."""
    adapter = Path(str(files("idlm") / "adapters" / DEFAULT_ADAPTER))
    shutil.copytree(source, folder / "model")
    shutil.copytree(adapter, folder / "adapter")
    config = json.loads((source / "config.json").read_text())
    group = config["num_attention_heads"] // config["num_key_value_heads"]
    config |= {"num_key_value_heads": SHARED_HEADS, "num_attention_heads": group * SHARED_HEADS}
    width = SHARED_HEADS * config["head_dim"]
    heads = Heads(group * width, width)
    write_json(folder / "model" / "config.json", config)
    for path in (folder / "model" / WEIGHTS, folder / "adapter" / LORA_FILE):
        write_safetensors(path, heads.pad(load_file(path)))
    fields = json.loads((adapter / CONFIG_FILE).read_text())
    fields["base_fingerprint"] = load_config(folder / "model").fingerprint()
    write_json(folder / "adapter" / CONFIG_FILE, fields)
    return folder / "model", folder / "adapter"


def main() -> None:
    """Write both folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", help="a folder with the default model")
    args = parser.parse_args()
    model, adapter = pad_default_model(args.folder, resolve(args.model))
    print(f"{model}\n{adapter}")


if __name__ == "__main__":
    main()

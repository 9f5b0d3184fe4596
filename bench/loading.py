"""Resident memory while a LLaMA folder in shards loads as NF4 on the CPU, beside what the memory plan says.

    python bench/loading.py                         # Llama-2-7B's shape: writes 13.5 GB under --folder, then removes it

Random bf16 weights in two shards as the hub has them. Floor: the plan's bytes (quantised weights, embeddings, the
largest weight once more); the interpreter and its libraries, measured before the load, are not in it.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure  # first: it puts the repository on the path

TINY = (64, 96, 2, 64, 32000)  # for a trial, as common.llama.Shape has it


def write(folder: Path, shape: tuple) -> None:
    """config.json, a tokenizer of 32,000 words, and model-*.safetensors in two parts."""
    import json

    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    words = ["<unk>", "<s>", "</s>", "make", "it", "red", *(f"word{i}" for i in range(31_994))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    width, mlp, layers, kv, words = shape
    wide = min(128, width // 4)
    sizes = {"vocab_size": words, "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    config = LlamaConfig(**sizes, num_attention_heads=width // wide, num_key_value_heads=kv // wide)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    names, weight_map = list(shapes), {}
    for part, some in enumerate((names[: len(names) * 3 // 4], names[len(names) * 3 // 4 :]), 1):
        file = f"model-{part:05d}-of-00002.safetensors"
        tensors = {name: torch.empty(shapes[name], dtype=torch.bfloat16).normal_(std=0.02) for name in some}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def load(folder: str) -> None:
    import torch

    from common import memory
    from common.llama import bitsandbytes, llm_shape, load_llm

    bitsandbytes()  # its memory is not the load's
    found, began = [], time.time()
    peak = measure.peak_bytes(lambda: found.append(load_llm(folder, torch.bfloat16, "cpu", "nf4"))) / 2**30
    seconds = time.time() - began
    plan = list(memory.frozen(llm_shape(folder), "nf4", 2, (0, 0)).items())[:2]  # the LLM and its largest weight
    planned = sum(amount for _, amount in plan) / 2**30
    held = sum(p.numel() * p.element_size() for p in found[0][0].parameters()) / 2**30
    size = f"{Path(folder).name} shape, bf16 in two shards"
    note = f"above the interpreter and its libraries; parameters {held:.2f} GiB; {seconds:.0f} s"
    measure.publish([measure.row("loading: NF4, peak resident", size, "cpu", peak, "GiB", planned, note)])
    print(f"peak {peak:.2f} GiB = {peak / planned:.2f} x the plan's {planned:.2f} GiB")


def main() -> None:
    found = measure.arguments(__doc__, shape="7b", folder=tempfile.gettempdir(), load="")
    if found.load:
        return load(found.load)
    from common.llama import llm_shape

    folder = Path(tempfile.mkdtemp(prefix="llama-", dir=found.folder))
    try:
        write(folder / found.shape, TINY if found.shape == "tiny" else llm_shape(f"Llama-2-{found.shape}"))
        subprocess.run([sys.executable, __file__, "--load", str(folder / found.shape)], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()

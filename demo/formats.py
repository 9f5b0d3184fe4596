"""How a stand-in model lies on disk: its tokenizer and its preprocessor in the format of the real one, its weights.

`demo/pretrain.py` trains the models (demo/standins.py) and writes them so: ordinary Hugging Face folders.
"""

import copy
import json
import os

import torch
import transformers

PIXELS = 96  # side of the picture that a model sees
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


# ---- tokenizers ----
def llama_tokenizer(folder: str, lines: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tok = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=True)
    tok.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    tok.train_from_iterator(
        (line for text in lines for line in text.split("\n")),
        trainers.BpeTrainer(vocab_size=1000, special_tokens=special, show_progress=False, min_frequency=5),
    )
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    os.makedirs(folder, exist_ok=True)
    tok.save(f"{folder}/tokenizer.json")
    write(
        f"{folder}/tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "legacy": False,
            "model_max_length": 512,
        },
    )
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def words_of(lines: list[str]) -> list[str]:
    return sorted({w for line in lines for w in "".join(c if c.isalnum() else " " for c in line.lower()).split()})


def bert_tokenizer(folder: str, lines: list[str]):
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *".,!?'-;:()"]
    vocab += [w for w in words_of(lines) if w not in vocab]
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/vocab.txt", "w") as f:
        f.write("\n".join(vocab))
    write(
        f"{folder}/tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512},
    )
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def clip_tokenizer(folder: str, lines: list[str], size: int = 1200):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.train_from_iterator(
        [" ".join(words_of([line])) for line in lines],
        trainers.BpeTrainer(vocab_size=size, end_of_word_suffix="</w>", show_progress=False, min_frequency=5),
    )
    merges = [tuple(m) for m in json.loads(tok.to_str())["model"]["merges"]]
    vocab = {}
    for token in [
        *letters,
        *(c + "</w>" for c in letters),
        *(x + y for x, y in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]:
        vocab.setdefault(token, len(vocab))
    os.makedirs(folder, exist_ok=True)
    write(f"{folder}/vocab.json", vocab)
    with open(f"{folder}/merges.txt", "w") as f:
        f.write("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    write(
        f"{folder}/tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
        },
    )
    return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


# ---- preprocessor and weights ----
def write(path: str, obj) -> None:
    with open(path, "w") as f:
        json.dump(obj, f, indent=1)


def preprocessor(folder: str, kind: str, pixels: int = PIXELS) -> None:
    """kind: "blip" and "clip-squashed" squash to a square, "clip" and "resnet" crop one."""
    base = {
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "do_resize": True,
        "resample": 3,
    }
    square = {"height": pixels, "width": pixels}
    write(
        f"{folder}/preprocessor_config.json",
        base
        | {
            "blip": {"image_processor_type": "BlipImageProcessor", "size": square},
            "clip": {
                "image_processor_type": "CLIPImageProcessor",
                "size": {"shortest_edge": pixels},
                "do_center_crop": True,
                "crop_size": square,
                "do_convert_rgb": True,
            },
            "clip-squashed": {
                "image_processor_type": "CLIPImageProcessor",
                "size": square,
                "do_center_crop": False,
                "do_convert_rgb": True,
            },
            "resnet": {
                "image_processor_type": "ConvNextImageProcessor",
                "size": {"shortest_edge": pixels},
                "crop_pct": 0.875,
            },
        }[kind],
    )


def save(model, folder: str, **facts) -> None:
    """Half precision on disk; the facts go to pretraining.json beside the weights."""
    model = copy.deepcopy(model)
    if isinstance(model, transformers.LlamaForCausalLM):
        rescale(model)
    model.half().save_pretrained(folder)
    write(f"{folder}/pretraining.json", facts)


@torch.no_grad()
def rescale(llama) -> None:
    """Multiplies the residual stream so that a word's embedding has unit variance. The function stays the same (every
    layer normalises what it reads), but a projection trained at ordinary rates now speaks as loudly as a word."""
    factor = 1 / llama.get_input_embeddings().weight.std()
    llama.get_input_embeddings().weight.mul_(factor)
    for layer in llama.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)

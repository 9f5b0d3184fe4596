"""Tiny random models of every kind the stages load, written as ordinary Hugging Face folders in under a second."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
)

OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TEXT = [
    "Request: Analyze given reference and target images and provide a description that transforms the reference "
    "to match the target.",
    "Reference: Target: Response: add a red hat to the dog",
    "shows two cats on a table",
    "Provide a brief description of the given image.",
]


def build(root: Path) -> None:
    """Write llama/ instructblip/ clip/ blip/ resnet/ under root; the weights are a function of this file alone."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    root = Path(root)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        llama(root / "llama")
        instructblip(root / "instructblip")
        blip(root / "blip")
        clip(root / "clip")
        resnet(root / "resnet")


def llama(folder: Path) -> None:
    """LLaMA with 2 layers of 64 and a byte-fallback BPE tokenizer without pad token, as Llama 2 has."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=400, show_progress=False, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)]
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "LlamaTokenizer",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "legacy": False,
            "model_max_length": 4096,
        },
    )
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def byte_level(folder: Path) -> None:
    """Puts a ByteLevel tokenizer, as Llama 3 and SmolLM2 have, in place of the one in a folder of llama()."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        TEXT * 2,
        trainers.BpeTrainer(
            vocab_size=400, show_progress=False, special_tokens=special, initial_alphabet=alphabet, min_frequency=1
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def instructblip(folder: Path) -> None:
    """InstructBLIP in several shards, with a language model inside that nobody should read."""
    vision = InstructBlipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        initializer_range=0.1,
    )
    qformer = InstructBlipQFormerConfig(
        vocab_size=64,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        encoder_hidden_size=32,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    model = InstructBlipForConditionalGeneration(
        InstructBlipConfig(
            vision_config=vision.to_dict(),
            qformer_config=qformer.to_dict(),
            text_config=text.to_dict(),
            num_query_tokens=32,
            image_token_index=63,
        )
    )
    with torch.no_grad():
        model.query_tokens.normal_(std=0.1)  # zeros at random init: the 32 tokens would all be the same
    model.save_pretrained(folder, max_shard_size="60KB")
    write(folder / "preprocessor_config.json", squash("BlipImageProcessor", 28))


def blip(folder: Path) -> None:
    """BLIP for image-text retrieval; the last two ids are [DEC] and [ENC], set by hand as in the hub's checkpoint."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + c for c in letters), *".,!?'-"]
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    write(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 512},
    )
    text = BlipTextConfig(
        vocab_size=len(words) + 2,
        hidden_size=32,
        encoder_hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=len(words),
        eos_token_id=3,
        sep_token_id=3,
        pad_token_id=0,
        initializer_range=0.1,
    )
    vision = BlipVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=16,
        initializer_range=0.1,
    )
    model = BlipForImageTextRetrieval(
        BlipConfig(image_text_hidden_size=20, text_config=text.to_dict(), vision_config=vision.to_dict())
    )
    model.save_pretrained(folder)
    write(folder / "preprocessor_config.json", squash("BlipImageProcessor", 32))


def clip(folder: Path) -> None:
    """CLIP with both towers; preprocessor_config.json in the hub's old spelling (plain integers)."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = [*letters, *(c + "</w>" for c in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    write(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n", encoding="utf-8")
    end = "<|endoftext|>"
    write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": end,
            "unk_token": end,
            "pad_token": end,
        },
    )
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    vision = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=64,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
    )
    model = CLIPModel(CLIPConfig(projection_dim=24, text_config=text.to_dict(), vision_config=vision.to_dict()))
    model.save_pretrained(folder)
    write(
        folder / "preprocessor_config.json",
        {
            "crop_size": 28,
            "do_center_crop": True,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "CLIPFeatureExtractor",
            "image_mean": OPENAI_MEAN,
            "image_std": OPENAI_STD,
            "resample": 3,
            "size": 28,
        },
    )


def resnet(folder: Path) -> None:
    """ResNet classifier, as the hub's file is; ConvNext preprocessing with crop_pct."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], layer_type="bottleneck", num_labels=10
    )
    ResNetForImageClassification(config).save_pretrained(folder)
    write(
        folder / "preprocessor_config.json",
        {
            "crop_pct": 0.875,
            "do_normalize": True,
            "do_resize": True,
            "feature_extractor_type": "ConvNextFeatureExtractor",
            "image_mean": IMAGENET_MEAN,
            "image_std": IMAGENET_STD,
            "resample": 3,
            "size": 64,
        },
    )


def squash(kind: str, size: int) -> dict:
    """preprocessor_config.json of BLIP and InstructBLIP: resize to a square, no crop."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": OPENAI_MEAN,
        "image_processor_type": kind,
        "image_std": OPENAI_STD,
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"height": size, "width": size},
    }


def draw(folder: Path, n: int, seed: int = 0, size: int = 48, kind: str = "png") -> list[str]:
    """n distinct little pictures (a coloured box on a coloured ground) -> their names, written under folder."""
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for i in range(n):
        pixels = np.empty((size, size, 3), np.uint8)
        pixels[:] = rng.integers(0, 256, 3)
        top, left = rng.integers(0, size // 2, 2)
        pixels[top : top + size // 3, left : left + size // 2] = rng.integers(0, 256, 3)
        names.append(f"{seed}-{i:03d}.{kind}")
        Image.fromarray(pixels).save(folder / names[-1])
    return names


def write(path: Path, record: object) -> None:
    path.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    import sys

    build(Path(sys.argv[1]))

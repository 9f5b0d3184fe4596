"""The shapes of the stand-in models, of drawn garments and of photographs alike: the real ones' families, small.

Each new_ function seeds torch and returns a model of Hugging Face, untrained; a picture has `pixels` x `pixels`."""

import torch
from torch import nn

PATCH, WIDTH, LAYERS, HEADS = 16, 192, 4, 6  # of the ViT
WORDS = 128  # width of the text encoders and the Q-Former, and of what CLIP and BLIP compare
_VIT = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_TEXT = {"hidden_size": WORDS, "intermediate_size": 2 * WORDS, "num_attention_heads": 4}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def sincos(grid: int, width: int) -> torch.Tensor:
    """2-D sine-cosine positions with a zero row for cls, (1, 1 + grid^2, width): a trained start stalls less."""
    omega = 100 ** -torch.arange(0, 1, 4 / width)
    at = torch.arange(grid).float()[:, None] * omega
    one = torch.cat([at.sin(), at.cos()], 1)
    both = torch.cat([one[:, None].expand(-1, grid, -1), one[None].expand(grid, -1, -1)], 2).reshape(grid * grid, width)
    return torch.cat([torch.zeros(1, width), both])[None]


def new_instructblip(queries: int, pixels: int, seed: int):
    """Its LLM is a dummy: the VDG takes the vision side alone."""
    from transformers import (
        InstructBlipConfig,
        InstructBlipForConditionalGeneration,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
        LlamaConfig,
    )

    torch.manual_seed(seed)
    vision = InstructBlipVisionConfig(**_VIT, image_size=pixels, patch_size=PATCH, initializer_range=0.02)
    sizes = {"vocab_size": 64, "num_hidden_layers": 4, "max_position_embeddings": 64}
    qformer = InstructBlipQFormerConfig(**_TEXT, **_NO_DROPOUT, **sizes, encoder_hidden_size=WIDTH)
    text = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    parts = {"vision_config": vision.to_dict(), "qformer_config": qformer.to_dict(), "text_config": text.to_dict()}
    config = InstructBlipConfig(**parts, num_query_tokens=queries, image_token_index=63)
    model = InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        model.query_tokens.normal_(std=0.5)
        model.vision_model.embeddings.position_embedding.copy_(sincos(pixels // PATCH, WIDTH))
    return model


def new_clip(tok, vit: str, pixels: int, seed: int):
    """CLIP for a tokenizer; its vision tower starts from the ViT in the folder `vit`."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(seed)
    ends = {"bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.eos_token_id}
    text = CLIPTextConfig(
        **_TEXT, **ends, vocab_size=len(tok), projection_dim=WORDS, num_hidden_layers=3, max_position_embeddings=77
    )
    vision = CLIPVisionConfig(**_VIT, projection_dim=WORDS, image_size=pixels, patch_size=PATCH, hidden_act="gelu")
    config = CLIPConfig(projection_dim=WORDS, text_config=text.to_dict(), vision_config=vision.to_dict())
    model = CLIPModel(config)
    start_from_vit(model.vision_model, vit)
    return model


def new_blip(vocab: int, vit: str, pixels: int, seed: int):
    """BLIP for a vocabulary whose last two are [DEC] and [ENC]; its vision tower is the ViT of `vit`, frozen."""
    from transformers import BlipConfig, BlipForImageTextRetrieval, BlipTextConfig, BlipVisionConfig

    torch.manual_seed(seed)
    ends = {"bos_token_id": vocab - 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    text = BlipTextConfig(
        **_TEXT, **_NO_DROPOUT, **ends, vocab_size=vocab, encoder_hidden_size=WIDTH, num_hidden_layers=3,
        max_position_embeddings=128,
    )  # fmt: skip
    vision = BlipVisionConfig(**_VIT, image_size=pixels, patch_size=PATCH)
    parts = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    model = BlipForImageTextRetrieval(BlipConfig(image_text_hidden_size=WORDS, **parts))
    model.vision_model.load_state_dict(vit_of(vit))
    model.vision_model.requires_grad_(False).eval()
    return model


def vit_of(folder: str) -> dict:
    """The trained ViT's tensors, without their prefix."""
    from safetensors.torch import load_file

    state = load_file(f"{folder}/model.safetensors")
    return {k.removeprefix("vision_model."): v.float() for k, v in state.items() if k.startswith("vision_model.")}


def start_from_vit(tower: nn.Module, folder: str) -> None:
    """Copies the trained ViT into CLIP's layout (q, k, v apart; an extra norm before the layers starts as it is)."""
    state, new = vit_of(folder), tower.state_dict()
    new["embeddings.class_embedding"] = state["embeddings.class_embedding"].flatten()
    new["embeddings.patch_embedding.weight"] = state["embeddings.patch_embedding.weight"]
    new["embeddings.position_embedding.weight"] = state["embeddings.position_embedding"][0]
    for i in range(len(tower.encoder.layers)):
        old, here = f"encoder.layers.{i}.", f"encoder.layers.{i}."
        for part in ("weight", "bias"):
            q, k, v = state[f"{old}self_attn.qkv.{part}"].chunk(3)
            new[f"{here}self_attn.q_proj.{part}"], new[f"{here}self_attn.k_proj.{part}"] = q, k
            new[f"{here}self_attn.v_proj.{part}"] = v
            new[f"{here}self_attn.out_proj.{part}"] = state[f"{old}self_attn.projection.{part}"]
            for norm in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"):
                new[f"{here}{norm}.{part}"] = state[f"{old}{norm}.{part}"]
    tower.load_state_dict(new)

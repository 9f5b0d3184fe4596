"""The frozen LLaMA: loading (bf16, int8, NF4), its tokenizer, and its layers spelled out."""

import logging
import os
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as checkpointed
from transformers import AutoModelForCausalLM

from common.console import UserError
from common.disk import warn_once
from common.hub import has_file, named
from common.pretrained import build_empty, read_config, read_exactly
from common.tokenizer import read_tokenizer
from kernels.decoding import rotate

# width, width of the MLP, layers, heads for keys and values; of 128 wide heads
LLAMA2 = {"7b": (4096, 11008, 32, 32), "13b": (5120, 13824, 40, 40), "70b": (8192, 28672, 80, 8)}


def load_llm(name: str, dtype: torch.dtype, device: torch.device | str, quantize: str = "", flag: str = "--llm"):
    """LLaMA from a folder or hub id -> (model in eval mode, frozen; tokenizer). quantize: "" | "int8" | "nf4".

    Weights stream from the files to the device, one tensor at a time: no accelerate, and no copy in host memory."""
    if quantize not in ("", "int8", "nf4"):
        raise UserError(f'quantize is {quantize!r}; "", "int8" or "nf4" is wanted')
    tokenizer = load_tokenizer(name, flag)
    llm, config = empty_llm(name, dtype, flag)
    convert = quantizer(llm, quantize, dtype, device) if quantize else None
    for key, tensor in read_llm(name, llm, dtype, device, flag):
        path, leaf = key.rsplit(".", 1)
        module = llm.get_submodule(path)
        weight = convert(module, leaf, tensor) if convert else None
        module._parameters[leaf] = nn.Parameter(tensor) if weight is None else weight
    llm.tie_weights()
    llm.model.rotary_emb = type(llm.model.rotary_emb)(config).to(device)  # its buffers are in no file, fp32
    return llm.requires_grad_(False).eval(), tokenizer


def empty_llm(name: str, dtype: torch.dtype, flag: str = "--llm") -> tuple:
    """-> a LLaMA as shapes alone, and its config."""
    config = read_config(name, ("llama",), flag)
    how = {"attn_implementation": "sdpa", "dtype": dtype, "trust_remote_code": False}
    return build_empty(AutoModelForCausalLM.from_config, name, flag, config, **how), config


def read_llm(name: str, llm: nn.Module, dtype: torch.dtype, device: torch.device | str, flag: str = "--llm"):
    """Yields (key, tensor) of each weight of an empty_llm, one at a time, on the device in dtype; a tied head once.

    UserError after the last where the files hold another head than the embeddings that config.json ties it to."""
    shapes = {key: weight.shape for key, weight in llm.named_parameters()}  # a tied lm_head.weight is not listed
    words, head = "model.embed_tokens.weight", "lm_head.weight"
    tied = {head: shapes[words]} if llm.config.tie_word_embeddings else {}
    both = {}  # older checkpoints store a tied one as well, and inv_freq
    for key, tensor in read_exactly(name, shapes, optional=tied, ignored=("rotary_emb.inv_freq",), flag=flag):
        tensor = tensor.to(device).to(dtype)  # in this order: a GPU converts in no time, one thread of the host in 30 s
        if tied and key in (words, head):
            both[key] = tensor
        if key not in tied:
            yield key, tensor
    if head in both and not torch.equal(*both.values()):
        wanted = 'set "tie_word_embeddings" to false, or remove lm_head.weight'
        raise UserError(f"{named(name, flag)}: config.json ties lm_head to the embeddings, its files do not: {wanted}")


def quantizer(llm: nn.Module, quantize: str, dtype: torch.dtype, device: torch.device | str):
    """Swap the linears (all but lm_head) for bitsandbytes' -> function (module, leaf, tensor) -> weight or None."""
    bnb = bitsandbytes()
    for name, linear in list(llm.named_modules()):
        if type(linear) is nn.Linear and name != "lm_head":
            size = (linear.in_features, linear.out_features, linear.bias is not None)
            with torch.device("meta"):
                if quantize == "nf4":
                    swap = bnb.nn.Linear4bit(*size, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
                    # on a CPU with AVX512-BF16 it would compute in bf16 whatever the dtype, and fail at widths that
                    # are no multiple of 64; without it every kind of CPU gives the same
                    swap.support_avx512bf16_for_cpu = False
                else:
                    swap = bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0)  # [HF]
            llm.set_submodule(name, swap)

    def convert(module: nn.Module, leaf: str, tensor: torch.Tensor) -> nn.Parameter | None:
        if leaf == "weight" and isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.nn.Params4bit(tensor, False, quant_type="nf4", compress_statistics=True, module=module)
            return weight.to(device)
        if leaf == "weight" and isinstance(module, bnb.nn.Linear8bitLt):
            # Int8Params.to() would leave what lies on a GPU already as it is until its first product
            rows, scales, _ = bnb.functional.int8_vectorwise_quant(tensor.to(torch.float16))
            return bnb.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)
        return None

    return convert


def bitsandbytes(flag: str = "--quantize"):
    """The library, imported when a flag wants it: it is optional."""
    # it would advise a package that nobody needs, and say at every int8 product that it computes in fp16
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as fault:
        raise UserError(f"{flag} wants bitsandbytes ({fault}): pip install bitsandbytes") from None
    return bitsandbytes


def make_optimizer(kind: str, weights: list, **how) -> torch.optim.Optimizer:
    """AdamW over the weights, "adamw8bit" with bitsandbytes' state of a quarter of the bytes."""
    if kind == "adamw8bit":
        return bitsandbytes("--optimizer adamw8bit").optim.AdamW8bit(weights, **how)
    if kind != "adamw":
        raise UserError(f"--optimizer {kind}: wanted adamw or adamw8bit")
    return torch.optim.AdamW(weights, **how)


def load_tokenizer(name: str, flag: str = "--llm"):
    """Tokenizer of a LLaMA folder or hub id; it must have the fast form, a start and an end token."""
    if not has_file(name, "tokenizer.json", flag):
        raise UserError(
            f"{named(name, flag)}: no tokenizer.json (tokenizer.model alone cannot be read); "
            "where sentencepiece is installed, AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it"
        )
    config = read_config(name, ("llama",), flag)
    tokenizer = read_tokenizer(name, config, config.vocab_size, flag)
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"{named(name, flag)}: its tokenizer_config.json sets no bos_token or no eos_token")
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in ends:
        own = f"{tokenizer.eos_token} ({tokenizer.eos_token_id})"
        warn_once(f"{named(name, flag)}: texts end with the tokenizer's {own}, config.json says {config.eos_token_id}")
    return tokenizer


def tokenize(tokenizer, text: str) -> list[int]:
    """Ids of one piece of text, without special tokens: a "</s>" written in a caption is text, not an end."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def answer_ids(tokenizer, text: str) -> list[int]:
    """Ids of a supervised text and the end token after it."""
    ids = tokenize(tokenizer, text.strip())
    if not ids:
        raise UserError(f"a caption without text: {text!r}; a row needs at least one supervised token")
    return [*ids, tokenizer.eos_token_id]


def positions_of(config) -> int:
    """How many tokens a row may have: what config.json says, stretched where its rotary embedding is."""
    most, rope = config.max_position_embeddings, config.rope_parameters or {}
    trained = rope.get("original_max_position_embeddings") or most  # Llama 3 names both, linear scaling this one alone
    return max(most, int(trained * (rope.get("factor") or 1)))


def require_room(name: str, tokenizer, rows: Iterable[tuple[object, int, tuple]], flag: str = "--llm") -> None:
    """UserError for the first row that is longer than the LLM has positions; rows: (its name, tokens besides, texts).

    A token has a byte at least, so that a text is only tokenised where its bytes could be too many."""
    most = positions_of(read_config(name, ("llama",), flag))
    for row, others, texts in rows:
        if others + sum(len(text.encode("utf-8", "surrogatepass")) + 3 for text in texts) <= most:  # "▁" before a text
            continue
        length = others + sum(len(tokenize(tokenizer, text)) for text in texts)
        if length > most:
            what = (
                f"{named(name, flag)} reads {most:,} tokens at most, and {row} has {length:,} with prompt and pictures"
            )
            raise UserError(f"{what}; shorten the text, or take another LLM")


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask=None, causal: bool = False) -> torch.Tensor:
    """q (B, T, H, d), k and v (B, S, H_kv, d), mask (T, S) True where seen, or None -> (B, T, H, d)."""
    learns = q.requires_grad or k.requires_grad or v.requires_grad
    if learns and q.device.type == "cpu" and q.element_size() == 2:  # PyTorch's backward in 16 bits is 15 times slower
        return attention(q.float(), k.float(), v.float(), mask, causal).to(q.dtype)
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, **grouped).transpose(1, 2)


def normalise(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """LlamaRMSNorm on x (..., D) as one kernel, where its own forward launches eight on a GPU.

    The same bits in fp32; in bf16 x times the weight is rounded once, by Hugging Face twice. [ours]"""
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def run_layers(llm: nn.Module, x: torch.Tensor, positions: torch.Tensor, attend, keep=..., checkpoint: bool = False):
    """x (..., T, D) at positions (T,) -> normalised outputs of the last layer, where `keep` (an index) says.

    attend(layer, q (..., T, H, d), k (..., T, H_kv, d), v) -> (..., T, H, d). The numbers of LlamaModel.forward, less
    what only other tokens of the last layer need. checkpoint: keep each layer's input alone, compute the rest again."""
    cos, sin = (table[0, :, None] for table in llm.model.rotary_emb(x, positions[None]))  # (T, 1, d)
    last = len(llm.model.layers) - 1

    def layer(i: int, x: torch.Tensor) -> torch.Tensor:
        block = llm.model.layers[i]
        h, attn = normalise(block.input_layernorm, x), block.self_attn
        q, k, v = (linear(h).unflatten(-1, (-1, attn.head_dim)) for linear in (attn.q_proj, attn.k_proj, attn.v_proj))
        h = attend(i, rotate(q, cos, sin), rotate(k, cos, sin), v).flatten(-2)
        if i == last:
            x, h = x[keep], h[keep]
        x = x + attn.o_proj(h)
        return x + block.mlp(normalise(block.post_attention_layernorm, x))

    for i in range(last + 1):
        # non-reentrant: the input of the first layer may need no gradient
        x = checkpointed(layer, i, x, use_reentrant=False) if checkpoint else layer(i, x)
    return normalise(llm.model.norm, x)


class Shape(NamedTuple):
    """Sizes of a LLaMA."""

    width: int
    mlp: int
    layers: int
    kv: int  # width of keys and of values
    vocabulary: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linears."""
        d, m = self.width, self.mlp
        attention = {"q_proj": (d, d), "k_proj": (d, self.kv), "v_proj": (d, self.kv), "o_proj": (d, d)}
        return attention | {"gate_proj": (d, m), "up_proj": (d, m), "down_proj": (m, d)}


def llm_shape(name: str, flag: str = "--llm") -> Shape:
    """From config.json; that of Llama 2, by its name on the hub, is known without a download."""
    known = re.search(r"llama-?2-(7b|13b|70b)", name.lower())
    if known and not os.path.isdir(name):
        width, mlp, layers, heads = LLAMA2[known[1]]
        return Shape(width, mlp, layers, heads * 128, 32000)
    c = read_config(name, ("llama",), flag)
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kv = c.num_key_value_heads * head
    return Shape(c.hidden_size, c.intermediate_size, c.num_hidden_layers, kv, c.vocab_size)

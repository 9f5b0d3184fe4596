"""common/llama.py: its spelled-out layers against transformers' own and against float64."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from common.console import UserError
from common.llama import attention, load_tokenizer, normalise, positions_of, require_room, run_layers

BITS = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}  # of the fraction


def roundings(x: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error of x, in steps between neighbouring numbers of its dtype at the size of the truth."""
    step = 2.0 ** (truth.abs().log2().floor() - BITS[x.dtype])
    return ((x.double() - truth).abs() / step).max().item()


@pytest.mark.parametrize("dtype", BITS)
def test_normalise_is_as_near_to_float64_as_transformers_is(dtype):
    make = torch.Generator().manual_seed(0)
    norm = LlamaRMSNorm(512, eps=1e-2)
    norm.weight.data = 1 + 0.3 * torch.randn(512, generator=make)
    norm = norm.to(dtype)
    scales = torch.randn(64, 1, generator=make).exp()  # rows near eps and far above it
    x = (torch.randn(64, 512, generator=make) * scales).to(dtype)
    exact = x.double()
    truth = norm.weight.double() * exact / (exact.square().mean(1, keepdim=True) + 1e-2).sqrt()
    ours, theirs = normalise(norm, x), norm(x)
    assert ours.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(ours, theirs)
    assert roundings(ours, truth) <= roundings(theirs, truth) < 4
    if dtype == torch.bfloat16:
        assert roundings(ours, truth) < 0.51, "one rounding"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_equal_those_of_transformers(dtype):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 50}
    llm = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1))
    for name, weight in llm.named_parameters():
        if "norm" in name:
            weight.data += 0.3 * torch.randn_like(weight)
    llm = llm.to(dtype).eval().requires_grad_(False)
    x = torch.randn(2, 9, 64).to(dtype)
    ours = run_layers(llm, x, torch.arange(9), lambda layer, q, k, v: attention(q, k, v, causal=True))
    theirs = llm.model(inputs_embeds=x).last_hidden_state
    truth = llm.double().model(inputs_embeds=x.double()).last_hidden_state
    error, reference = ((y - truth).norm().item() for y in (ours, theirs))
    assert error < 1.3 * reference + 1e-6 * truth.norm().item()
    assert reference < {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype] * truth.norm().item()


@pytest.mark.parametrize("dtype", BITS)
def test_attention_and_its_gradient_are_as_near_to_float64_as_pytorch_is(dtype):
    """On a CPU 16 bits learn through fp32, which is no worse and many times faster in the backward pass."""
    make = torch.Generator().manual_seed(0)
    shapes = ((3, 17, 6, 16), (3, 17, 2, 16), (3, 17, 2, 16))
    given = [torch.randn(*shape, generator=make).to(dtype) for shape in shapes]
    weights = torch.randn(3, 17, 6, 16, generator=make).to(dtype)

    def passed(function, dtype) -> list[torch.Tensor]:
        q, k, v = (x.to(dtype).requires_grad_() for x in given)
        out = function(q, k, v)
        assert out.dtype == dtype
        return [out, *torch.autograd.grad((out * weights.to(dtype)).sum(), (q, k, v))]

    def plain(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    truth = passed(plain, torch.float64)
    ours, theirs = (passed(function, dtype) for function in (lambda *qkv: attention(*qkv, causal=True), plain))
    for mine, other, exact in zip(ours, theirs, truth, strict=True):
        assert mine.dtype == dtype
        assert (mine - exact).norm() <= 1.01 * (other - exact).norm() + 1e-7


def test_positions_are_those_of_a_stretched_rotary_embedding():
    """As Vicuna-16k and Llama 3.1 say it: the one names what the model was trained with, the other what it reads."""
    linear = {"rope_type": "linear", "factor": 4.0}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"original_max_position_embeddings": 8192}
    for most, scaling, wanted in ((4096, None, 4096), (4096, linear, 16384), (131072, llama3, 131072)):
        record = {"model_type": "llama", "max_position_embeddings": most, "rope_scaling": scaling}
        assert positions_of(LlamaConfig.from_dict(record)) == wanted


def test_a_text_is_tokenised_only_where_it_could_be_too_long(zoo):
    """The LLaMA has 256 positions; a letter that its tokenizer does not know is three bytes, a token each."""
    tokenizer, name = load_tokenizer(str(zoo / "llama")), str(zoo / "llama")
    words = tokenizer("\u9577" * 60, add_special_tokens=False).input_ids
    assert len(words) >= 180

    def refuse(*_, **__):
        raise AssertionError("tokenised")

    require_room(name, refuse, [("a", 100, ("make it red", "x" * 100)), ("b", 256, ())])
    require_room(name, tokenizer, [("a", 256 - len(words), ("\u9577" * 60,)), ("b", 10, ("make it red " * 30,))])
    with pytest.raises(UserError, match=f"^--llm {name} reads 256 tokens at most, and b has 257 with prompt"):
        require_room(name, tokenizer, [("a", 10, ()), ("b", 257 - len(words), ("\u9577" * 60,))])

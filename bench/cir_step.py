"""One training step of BLIP_tdm without its pictures' decoding, beside the work that the VDG release does for one.

    python bench/cir_step.py                     # a third of blip-itm-large-coco's layers and side, fp32, CPU
    python bench/cir_step.py --device cuda       # all of it, bf16, B = B' = 64
    ... --text 1                                 # the text encoder alone, on random patches: 2 B texts, back and forth

A step: vision encoder (frozen), composition, L_tcc over B and over B + B' (Eq. 2, beta = 0.5), L_tdm (Eq. 3), backward,
AdamW. `views` has the vision encoder's tokens already, as with train_cir.py --views K. `release` encodes the pictures
of B twice, once for each term of Eq. 2; it has BLIP's own attention, all texts padded to the longest, and autograd's
way through a log-domain loss. What it composes twice is composed once here, which is kind to it. Before time is taken,
all must give the same loss. Floor: 1.0 TFLOP a triplet at the speed of a large product (only at full size).
"""

import tempfile
from pathlib import Path

import generation  # beside this file
import loss as losses
import measure
import real_step

BETA, TAU, LR = losses.BETA, losses.TAU, 1e-5


def batch(model, size: int, device: str):
    """Pictures as bytes (4 B, S, S, 3): references of B and of B', then the targets of both; 2 B deltas."""
    import torch

    generator = torch.Generator().manual_seed(1)
    side = model.preprocess.size
    pictures = torch.randint(0, 256, (4 * size, side, side, 3), generator=generator, dtype=torch.uint8)
    # 12 words in the mean, one in ten longer than 18, the longest about 30: CIRR's val captions
    lengths = (12 * torch.randn(2 * size, generator=generator).mul(0.4).exp()).clamp(2, 40).long().tolist()
    draw = torch.randint(0, len(real_step.WORDS), (2 * size, 40), generator=generator).tolist()
    deltas = [" ".join(real_step.WORDS[i] for i in row[:n]) for row, n in zip(draw, lengths, strict=True)]
    return pictures.to(device), deltas


def switch(model, device: str):
    """A function that gives the model the release's attention and padding (True), or train_cir.py's own."""
    import functools

    import torch
    from transformers.models.blip.modeling_blip import BlipAttention
    from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

    import train_cir

    kinds = (BlipAttention, BlipTextSelfAttention)
    ours = {m: type(m) for m in model.backbone.modules() if isinstance(m, kinds)}

    def padded(tokens, texts, backward=False):
        """BlipTdm.ground without its groups."""
        ids, mask = model.tokenize(texts, device, backward)
        ids[:, 0] = model.first_token
        return model.backbone.text_encoder(ids, mask, encoder_hidden_states=tokens).last_hidden_state, mask

    def to(release: bool) -> None:
        torch.backends.cuda.enable_cudnn_sdp(release)  # off in our stages, on as installed
        for module, kind in ours.items():
            module.__class__ = next(own for own in kinds if issubclass(kind, own)) if release else kind
        model.ground = padded if release else functools.partial(train_cir.BlipTdm.ground, model)

    return to


def make_text_steps(model, size: int, device: str) -> dict:
    """name -> a function that makes one pass of 2 B texts through the text encoder and back, and returns a number."""
    import torch

    from common.encoding import Compute

    _, deltas = batch(model, size, device)
    patches = (model.preprocess.size // 16) ** 2 + 1
    width = model.backbone.config.vision_config.hidden_size
    tokens = torch.randn(2 * size, patches, width, generator=torch.Generator().manual_seed(1)).to(device)
    to_release, cast = switch(model, device), Compute(size, device, real_step.torch_dtype(device)).autocast()

    def step(name: str):
        to_release(name == "release")
        with cast:
            states, mask = model.ground(tokens.to(real_step.torch_dtype(device)), deltas)
        value = (states.float() * mask[..., None]).pow(2).mean()
        model.zero_grad()
        value.backward()
        return value

    return {name: (lambda name=name: step(name)) for name in ("ours", "release")}


def make_steps(model, size: int, device: str) -> dict:
    """name -> a function that makes one step and returns its loss; they share the model."""
    import torch

    import train_cir
    from common import encoding
    from common.encoding import Compute
    from common.ranks import gradient_norm
    from kernels.contrastive import l_tcc
    from kernels.negatives import draw_negatives

    pictures, deltas = batch(model, size, device)
    human = torch.arange(4 * size, device=device) % (2 * size) < size
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR)
    to_release, cast = switch(model, device), Compute(size, device, real_step.torch_dtype(device)).autocast()

    @torch.no_grad()
    def tokens(of: torch.Tensor) -> torch.Tensor:
        with cast:
            return torch.cat([model.tokens(model.preprocess.normalise(part)) for part in of.split(encoding.AT_ONCE)])

    kept = tokens(pictures)

    def step(name: str):
        to_release(name == "release")
        if name == "release":
            tokens(pictures[human])  # for the first term of Eq. 2; the second encodes them again
        found = kept if name == "views" else tokens(pictures)
        reference, target = found.chunk(2)
        with cast:
            x, c = model.target(target), model.compose(reference, deltas)
        if name == "release":
            loss = losses.eager(x[:size], c[:size]) + losses.eager(x, c)
        else:
            loss = l_tcc(x, c, size, TAU, 1.0, BETA)
        noise = torch.Generator().manual_seed(2)
        negatives = draw_negatives(x.detach(), c.detach(), list(range(2 * size)), TAU, noise)
        with cast:
            loss = loss + train_cir.tdm_loss(model, target, deltas, list(range(2 * size)), negatives).mean()
        optimizer.zero_grad()
        loss.backward()
        gradient_norm(weights)
        optimizer.step()
        return loss

    return {name: (lambda name=name: step(name)) for name in ("ours", "views", "release")}


def main() -> None:
    found = measure.arguments(__doc__, batch=0, small=0, rounds=3, text=0)

    import train_cir

    device, small = found.device, found.small or (1 if found.device == "cuda" else 3)
    size = found.batch or (64 if device == "cuda" else 4)
    with tempfile.TemporaryDirectory() as scratch:
        parameters = real_step.write_blip(Path(scratch), small, device)
        model = train_cir.build_cir("blip_tdm", scratch, tau=TAU).to(device).train()
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.eval()  # no dropout
    steps, first = (make_text_steps if found.text else make_steps)(model, size, device), {}
    for name, step in steps.items():
        for weight, p in model.named_parameters():
            if p.requires_grad:
                p.data.copy_(start[weight])
        first[name] = step().item()
        print(f"{name}: loss {first[name]:.5f}", flush=True)
    assert max(first.values()) - min(first.values()) < (1e-3 if device == "cpu" else 0.2), "not the same work"
    model.train()
    seconds = measure.interleave({n: lambda s=s: measure.clock(s, device) for n, s in steps.items()}, found.rounds)

    pace = {name: [2 * size / s for s in times] for name, times in seconds.items()}
    floor = (
        generation.peak_flops(device, real_step.torch_dtype(device)) / 1e12 if small == 1 and not found.text else None
    )
    shape = f"{parameters / 1e6:.0f} M parameters, {384 // small} px, B = B' = {size}"
    what, unit = "CIR step without decoding: BLIP_tdm", "triplets/s"
    if found.text:
        what, unit = "CIR step: BLIP's text encoder", "texts/s"
    rows = measure.pace_rows(what, shape, device, pace, unit, floor)
    for name in list(pace)[:-1]:
        value, note = measure.ratio(pace[name], pace["release"])
        rows.append(measure.row(f"{what}: {name} / the release's work", shape, device, value, "x", note=note))
    measure.publish(rows)
    if device == "cuda":
        measure.profile("a step, pictures encoded", steps["ours"])


if __name__ == "__main__":
    main()

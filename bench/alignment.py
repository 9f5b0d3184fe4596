"""Alignment: captions per second of vdg_align.py's step beside the usual one on a padded Hugging Face forward.

    python bench/alignment.py                   # LLaMA of 30 M parameters, fp32, CPU, 16 captions a step
    python bench/alignment.py --device cuda --batch 64      # 13B, bf16, random weights made on the device

A step: projection of 32 Q-Former outputs, forward through the frozen LLM, backward to the projection, AdamW. Prompts of
9 tokens, captions of 4 to 24. Tokens of use: all that are no padding. Both must give the same loss first.
Floor: 4 FLOP a frozen weight and token of use (forward, and backward without gradients of the weights), the head's at
the captions' tokens alone, at the speed of a large product on the same device.
"""

import generation  # beside this file
import measure
import tuning

PROMPT = (7, 2)  # tokens before and after the image


def batches(llm, batch: int, count: int, device: str) -> list[tuple]:
    """Steps of (queries (B, Q, WIDTH), the captions' ids)."""
    import torch

    draw = torch.Generator().manual_seed(4)
    made = []
    for _ in range(count):
        queries = torch.randn(batch, generation.QUERIES, tuning.WIDTH, generator=draw).to(device)
        lengths = torch.randint(4, 25, (batch,), generator=draw).tolist()
        made.append(
            (queries, [torch.randint(3, llm.config.vocab_size, (n,), generator=draw).tolist() for n in lengths])
        )
    return made


def losses_of(llm, projection, device: str) -> dict:
    """name -> (queries, captions) -> loss."""
    import torch
    from torch import nn

    import vdg_align

    draw = torch.Generator().manual_seed(5)
    before, after = (torch.randint(3, llm.config.vocab_size, (n,), generator=draw).tolist() for n in PROMPT)
    embed = llm.get_input_embeddings()

    def packed(queries, captions):
        torch.backends.cuda.enable_cudnn_sdp(False)  # as in our stages
        images = projection(queries).to(embed.weight)
        batch = vdg_align.pack(embed, [[before, image, after] for image in images], captions)
        return vdg_align.caption_loss(llm, batch, sum(map(len, captions)))

    def padded(queries, captions):
        """Rows padded to the longest, labels -100 elsewhere, the library's loss over all positions."""
        torch.backends.cuda.enable_cudnn_sdp(True)  # as installed
        first, last = (embed(torch.tensor(ids, device=device)) for ids in (before, after))
        rows, labels = [], []
        for image, caption in zip(projection(queries).to(embed.weight), captions, strict=True):
            caption = torch.tensor(caption, device=device)
            rows.append(torch.cat([first, image, last, embed(caption)]))
            labels.append(torch.cat([torch.full((len(rows[-1]) - len(caption),), -100, device=device), caption]))
        x, y = (nn.utils.rnn.pad_sequence(v, True, p) for v, p in ((rows, 0.0), (labels, -100)))
        mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), device=device) for row in rows], True)
        return llm(inputs_embeds=x, attention_mask=mask, labels=y).loss

    return {"ours": packed, "padded": padded}


def main() -> None:
    found = measure.arguments(__doc__, batch=16, steps=2, rounds=3)
    import torch

    device = found.device
    llm = generation.random_llm(device)
    projection = tuning.new_projection(llm, device)
    optimizer = torch.optim.AdamW(projection.parameters(), lr=1e-4)
    work, forms = batches(llm, found.batch, found.steps, device), losses_of(llm, projection, device)
    with torch.no_grad():
        first = {name: form(*work[0]).item() for name, form in forms.items()}
    print(", ".join(f"{name}: loss {loss:.6f}" for name, loss in first.items()))
    assert abs(first["ours"] - first["padded"]) < (1e-4 if device == "cpu" else 0.05), "they do not do the same work"

    def step(form) -> None:
        for queries, captions in work:
            form(queries, captions).backward()
            optimizer.step()
            optimizer.zero_grad()

    runs = {name: lambda form=form: measure.clock(lambda: step(form), device) for name, form in forms.items()}
    seconds = measure.interleave(runs, found.rounds)
    words = sum(len(caption) for _, captions in work for caption in captions)
    tokens = found.batch * found.steps * (sum(PROMPT) + generation.QUERIES) + words
    weights, head = generation.linear_weights(llm), llm.lm_head.weight.numel()
    floor = tokens * generation.peak_flops(device, llm.dtype) / (4 * weights * tokens + 4 * head * words)
    size = f"{(weights + 2 * head) / 1e6:,.0f}M parameters, {str(llm.dtype)[6:]}, {found.batch} captions a step"
    pace = {name: [tokens / s for s in times] for name, times in seconds.items()}
    rows = measure.pace_rows("alignment", size, device, pace, "tokens/s", floor)
    print(f"{tokens / (found.batch * found.steps):.1f} tokens of use a caption")
    value, note = measure.ratio(pace["ours"], pace["padded"])
    rows.append(measure.row("alignment: ours against padded", size, device, value, "x", note=note))
    measure.publish(rows)


if __name__ == "__main__":
    main()

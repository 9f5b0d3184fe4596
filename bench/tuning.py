"""Tuning of the VDG: tokens of use per second of vdg_tune.py's step beside PEFT's LoRA on a padded HF forward.

    python bench/tuning.py                      # LLaMA of 30 M parameters, fp32, CPU
    python bench/tuning.py --device cuda        # 13B, bf16, random weights made on the device
    ... --shape 7b --quantize nf4               # Llama-2-7B's shape as NF4 (or int8) by bitsandbytes, LoRA in fp32
    ... --batch 64 --only packed,tree,peft      # without a peer whose attention to a packed line is quadratic

A step: projection of the Q-Former outputs, forward, backward, AdamW; LoRA of rank 64 on q and v, dropout 0.05 [S4.1].
A batch is one subgroup: nine pairs of six references (or `--batch`), deltas of 5 to 33 tokens. Tokens of use: all that
are no padding, counted once a row for everyone, also where the tree holds shared ones once. All
must give the same loss without dropout. `packed` holds the instruction once a batch, `tree` each reference too; `peft`
pads the rows to the longest, `peft-packed` lays them behind one another, each with positions of its own. Floor: 4 FLOP
a frozen weight and token of use (forward, and backward without gradients of the weights) at the speed of a large
product on the same device; sharing can pass it.
"""

import contextlib
import gc
import itertools

import generation  # beside this file
import measure

RANK, ALPHA, DROPOUT, TARGETS = 64, 16.0, 0.05, ("q_proj", "v_proj")
WIDTH = 768  # of the Q-Former


def batches(llm, batch: int, count: int, device: str):
    """Batches of (queries (B, 2, Q, WIDTH), names of the references, answers)."""
    import torch

    from common.annotations import cirr_template

    pairs = cirr_template(6)  # nine of a subgroup
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(count):
        queries, names, answers = [], [], []
        while len(names) < batch:
            images = torch.randn(6, generation.QUERIES, WIDTH, generator=generator)
            for a, b in pairs[: batch - len(names)]:
                queries.append(torch.stack([images[a], images[b]]))
                names.append((len(names) // len(pairs), a))
                length = int(torch.randint(5, 34, (), generator=generator))
                ids = torch.randint(3, llm.config.vocab_size, (length,), generator=generator)
                answers.append(ids.tolist())
        made.append((torch.stack(queries).to(device), names, answers))
    return made


def new_projection(llm, device: str):
    """Linear layer WIDTH -> D, whose tokens are of the size of words."""
    import torch

    projection = torch.nn.Linear(WIDTH, llm.config.hidden_size)
    projection.weight.data.normal_(std=0.02 / WIDTH**0.5, generator=torch.Generator().manual_seed(3))
    projection.bias.data.zero_()
    return projection.to(device)


def contestant(name: str, batch: int, steps: int, device: str, quantize: str, shape: str):
    """A function that trains once on each batch, the first batch's loss, and the GiB held at most."""
    import torch
    from torch import nn

    torch.backends.cuda.enable_cudnn_sdp("peft" in name)  # off in our stages, on as installed
    llm = generation.random_llm(device, quantize, shape)
    ids = generation.problem(llm, 1, "cpu")[0]
    projection = new_projection(llm, device)
    work = batches(llm, batch, steps, device)

    if "peft" in name:
        import peft

        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(TARGETS))
        llm = peft.get_peft_model(llm, config)
        embed = llm.get_input_embeddings()
        texts = [embed(torch.tensor(x, device=device)) for x in ids]

        cast = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

        def loss_of(queries, _, answers):
            """The usual collators: rows padded to the longest, or packed; labels -100 elsewhere, HF's loss over all
            positions."""
            images = projection(queries).to(texts[0])
            rows, labels = [], []
            for (a, b), answer in zip(images, answers, strict=True):
                answer = torch.tensor(answer, device=device)
                rows.append(torch.cat([texts[0], a, texts[1], b, texts[2], embed(answer)]))
                nothing = torch.full((len(rows[-1]) - len(answer),), -100, device=device)
                labels.append(torch.cat([nothing, answer]))
            if name == "peft-packed":  # HF makes the mask from positions that begin again
                x, y = torch.cat(rows)[None], torch.cat(labels)[None]
                places = {"position_ids": torch.cat([torch.arange(len(r), device=device) for r in rows])[None]}
            else:
                x, y = (nn.utils.rnn.pad_sequence(v, True, p) for v, p in ((rows, 0.0), (labels, -100)))
                places = {"attention_mask": (y != -100).flip(1).cummax(1).values.flip(1)}
            with cast:  # PEFT keeps its matrices in fp32
                return llm(inputs_embeds=x, labels=y, use_cache=False, **places).loss

    else:
        import vdg_align
        import vdg_tune

        vdg_tune.add_lora(llm, RANK, ALPHA, DROPOUT, TARGETS)
        pieces = [ids[0], "<reference>", ids[1], "<target>", ids[2]]

        def loss_of(queries, names, answers):
            batch = vdg_tune.delta_batch(llm, projection, pieces, queries, answers, names if name == "tree" else None)
            return vdg_align.caption_loss(llm, batch, sum(map(len, answers)))

    weights = [p for p in (*llm.parameters(), *projection.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=2e-4)

    def run() -> None:
        for one in work:
            loss_of(*one).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    llm.eval()
    loss = loss_of(*work[0]).item()
    llm.train()
    run()
    memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0
    if device == "cuda":
        measure.profile(f"{name}, {steps} steps", run, 10)
    return run, [loss, memory]


def alone(name: str, found) -> tuple[dict, list]:
    """The seconds of a contestant on a GPU that holds nobody else, and what contestant says of it."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    run, ready = contestant(name, found.batch, found.steps, found.device, found.quantize, found.shape)
    return measure.interleave({name: lambda: measure.clock(run, found.device)}, found.rounds), ready


def main() -> None:
    found = measure.arguments(__doc__, batch=9, steps=2, rounds=5, serve="", quantize="", shape="", only="")
    import torch

    device = found.device
    if found.serve:
        run, ready = contestant(found.serve, found.batch, found.steps, device, found.quantize, found.shape)
        return measure.serve(run, ready, device)
    contestants, seconds, ready = {}, {}, {}
    chosen = found.only.split(",") if found.only else ["packed", "tree", "peft", "peft-packed"]
    for name in chosen:
        if device == "cuda":  # four models of 26 GB would not fit: one after another
            times, ready[name] = alone(name, found)
            seconds |= times
            print(f"{name}: {' '.join(f'{s:.4f}' for s in times[name])} s", flush=True)  # should a later one not end
            gc.collect()  # a model's modules hold each other
            torch.cuda.empty_cache()
            continue
        argv = ["--serve", name, "--batch", str(found.batch), "--steps", str(found.steps), "--device", device]
        argv += ["--quantize", found.quantize, "--shape", found.shape]
        contestants[name] = measure.Contestant(__file__, *argv)
        ready[name] = contestants[name].ready
    for name, (loss, memory) in ready.items():
        print(f"{name}: loss {loss:.6f}" + f", {memory:.1f} GiB at most" * bool(memory))
    losses = [loss for loss, _ in ready.values()]
    assert max(losses) - min(losses) < (1e-4 if device == "cpu" else 0.05), "the contestants do not do the same work"
    if device == "cpu":
        seconds = measure.interleave(contestants, found.rounds)
        for process in contestants.values():
            process.close()

    llm = generation.random_llm(device, found.quantize, found.shape)
    prompt = sum(generation.PARTS) + 2 * generation.QUERIES
    answers = sum(len(answer) for _, _, part in batches(llm, found.batch, found.steps, "cpu") for answer in part)
    tokens = found.batch * found.steps * prompt + answers
    weights, head = generation.linear_weights(llm), llm.lm_head.weight.numel()
    floor = tokens * generation.peak_flops(device, llm.dtype) / (4 * weights * tokens + 4 * head * answers)
    kind = found.quantize or str(llm.dtype)[6:]
    size = f"{(weights + 2 * head) / 1e6:,.0f}M parameters, {kind}, {found.batch} triplets a step"
    pace = {name: [tokens / s for s in times] for name, times in seconds.items()}
    rows = measure.pace_rows("tuning", size, device, pace, "tokens/s", floor)
    peers = ("peft", "padded"), ("peft-packed", "packed")
    for name, (peer, way) in itertools.product(("packed", "tree"), peers):
        if not {name, peer} <= set(chosen):
            continue
        value, note = measure.ratio(pace[name], pace[peer])
        rows.append(measure.row(f"tuning: {name} against PEFT, {way}", size, device, value, "x", note=note))
    measure.publish(rows)


if __name__ == "__main__":
    main()

"""Generation of deltas: pairs per second of gen_deltas.py beside Hugging Face's generate and the release's way.

    python bench/generation.py                      # LLaMA of 30 M parameters, fp32, CPU
    python bench/generation.py --device cuda        # 13B, bf16, random weights made on the device

Greedy, `--new` tokens each (no end token), 30 + 32 + 4 + 32 + 5 prompt tokens, 2.8 pairs to a reference [Table 6].
Peers: generate() at several batch sizes; on a GPU also with a static cache, whose decoding it compiles; and a loop
without any cache, as the VDG release has it (its ViT and Q-Former, which it runs again for every token too, are left
out: kind to it). Before time is taken, the tokens of all are compared. Floor: the products of the shared work at the
speed of a large product on the same device.
"""

import measure  # first: it puts the repository on the path

PARTS = (30, 4, 5)  # tokens of the prompt before, between and after the images
QUERIES = 32  # image tokens
SMALL = (512, 1376, 8, 512, 8192)  # a LLaMA for CPUs, as common.llama.Shape has it; its heads are 64 wide


def random_llm(device: str, quantize: str = "", shape: str = ""):
    """LLaMA with random weights, made where it is used: fp32 on CPU, bf16 on a GPU; quantize as load_llm's.

    shape: "7b", "13b" or "70b" of Llama 2; by default SMALL on a CPU, 13b on a GPU."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from common.llama import Shape, llm_shape, quantizer

    small = not shape and device == "cpu"
    s = Shape(*SMALL) if small else llm_shape(f"Llama-2-{shape or '13b'}")
    wide, dtype = 64 if small else 128, torch.float32 if device == "cpu" else torch.bfloat16
    sizes = {"vocab_size": s.vocabulary, "hidden_size": s.width, "intermediate_size": s.mlp}
    sizes |= {"num_attention_heads": s.width // wide, "num_key_value_heads": s.kv // wide}
    sizes |= {"num_hidden_layers": s.layers}
    config = LlamaConfig(**sizes, max_position_embeddings=512)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        llm = LlamaForCausalLM(config).to(dtype)
    shapes = {name: weight.shape for name, weight in llm.named_parameters()}
    convert = quantizer(llm, quantize, dtype, device) if quantize else lambda *_: None
    torch.manual_seed(0)
    for name, size in shapes.items():
        weight = torch.empty(size, dtype=dtype, device=device)
        weight = weight.normal_(std=0.02) if len(size) > 1 else weight.fill_(1)
        path, leaf = name.rsplit(".", 1)
        module = llm.get_submodule(path)
        converted = convert(module, leaf, weight)
        module._parameters[leaf] = torch.nn.Parameter(weight) if converted is None else converted
    llm.model.rotary_emb = type(llm.model.rotary_emb)(config).to(device)
    return llm.requires_grad_(False).eval()


def linear_weights(llm) -> int:
    """Weights that each token meets in a product, without lm_head."""
    return sum(m.in_features * m.out_features for m in llm.model.layers.modules() if hasattr(m, "in_features"))


def peak_flops(device: str, dtype) -> float:
    """FLOP/s of a large product, the best of ten."""
    import torch

    n = 2048 if device == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in "ab")
    return 2 * n**3 / min(measure.clock(lambda: a @ b, device) for _ in range(10))


def problem(llm, pairs: int, device: str):
    """prompt ids, image tokens (R, Q, D) of references and (B, Q, D) of targets, reference of each pair."""
    import torch

    generator = torch.Generator().manual_seed(1)
    vocabulary, width = llm.config.vocab_size, llm.config.hidden_size
    ids = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in PARTS]
    count = max(1, round(pairs / 2.8))
    images = torch.randn(count + pairs, QUERIES, width, generator=generator) * 0.02
    row = [i * count // pairs for i in range(pairs)]
    return ids, images[:count].to(device), images[count:].to(device), row


def contestant(name: str, batch: int, pairs: int, new: int, device: str, llm=None):
    """A function that says the deltas of all pairs once -> their tokens."""
    if name == "ours":
        import gen_deltas  # noqa: F401  before torch: it sets MKL's summation order, which ours pays for
    import torch

    from common.decode import Sampling, generate, start_engine

    llm = llm or random_llm(device)
    ids, references, targets, row = problem(llm, pairs, device)
    embed = llm.get_input_embeddings()
    parts = [embed(torch.tensor(x, device=device)) for x in ids]

    def prompts(start: int, stop: int):
        n = stop - start
        first, second = references[row[start:stop]], targets[start:stop]
        texts = [part.expand(n, -1, -1) for part in parts]
        return torch.cat([texts[0], first.to(parts[0]), texts[1], second.to(parts[0]), texts[2]], 1)

    @torch.inference_mode()
    def run() -> list:
        torch.backends.cuda.enable_cudnn_sdp(name != "ours")  # off in our stages, on as installed
        said = []
        for start in range(0, pairs, batch):
            stop = min(start + batch, pairs)
            if name == "ours":
                used = sorted(set(row[start:stop]))
                places = [used.index(r) for r in row[start:stop]]
                keys = torch.zeros(stop - start, dtype=torch.long, device=device)
                said += generate(engine, references[used], targets[start:stop], places, keys, stop - start).tolist()
            elif name == "release":
                x, tokens = prompts(start, stop), []
                for _ in range(new):
                    tokens.append(llm(inputs_embeds=x, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(-1))
                    x = torch.cat([x, embed(tokens[-1])[:, None]], 1)
                said += torch.stack(tokens, 1).tolist()
            else:
                x = prompts(start, stop)
                how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
                if name == "static":
                    how["cache_implementation"] = "static"
                mask = torch.ones(x.shape[:2], device=device)
                said += llm.generate(inputs_embeds=x, attention_mask=mask, **how).tolist()
        return said

    if name == "ours":
        greedy = Sampling(eos=-1, max_new=new, temperature=0.0, top_k=0)
        engine = start_engine(llm, ids, QUERIES, batch, greedy, device == "cuda")
    return run


def main() -> None:
    found = measure.arguments(__doc__, pairs=128, new=20, rounds=3, only="", serve="", batch=0)
    device = found.device
    if found.serve:
        run = contestant(found.serve, found.batch, found.pairs, found.new, device)
        return measure.serve(run, run(), device)
    largest = found.pairs
    sizes = {f"ours-{n}": n for n in (64, largest)} | {f"generate-{n}": n for n in (8, 64, largest)}
    sizes |= {"static-64": 64} if device == "cuda" else {}
    sizes |= {"release-8": 8}
    chosen = found.only.split(",") if found.only else list(sizes)
    contestants, count, said = {}, {}, {}
    llm = random_llm(device) if device == "cuda" else None  # a GPU holds one: all take turns with it, in this process
    for name in chosen:
        kind, batch = name.split("-")
        count[name] = 8 if kind == "release" else found.pairs  # it takes long: a share of the pairs will do
        if device == "cuda":
            run = contestant(kind, int(batch), count[name], found.new, device, llm)
            said[name] = run()
            contestants[name] = lambda run=run: measure.clock(run, device)
            continue
        argv = ["--serve", kind, "--batch", batch, "--pairs", str(found.pairs), "--new", str(found.new)]
        if kind == "release":
            argv[5] = str(count[name])
        argv += ["--device", device]
        contestants[name] = measure.Contestant(__file__, *argv, env={"MKL_CBWR": None})
        said[name] = contestants[name].ready
    reference = said[chosen[0]]
    same = {name: sum(a == b for a, b in zip(x, reference, strict=False)) / len(x) for name, x in said.items()}
    if "release-8" in same:  # it was given fewer references: other pictures
        del same["release-8"]
    print("pairs whose tokens equal those of", chosen[0], {name: f"{share:.1%}" for name, share in same.items()})
    first = {n: sum(a[0] == b[0] for a, b in zip(said[n], reference, strict=False)) / len(said[n]) for n in same}
    print("  of their first tokens", {name: f"{share:.1%}" for name, share in first.items()}, flush=True)
    seconds = measure.interleave(contestants, found.rounds)
    if device == "cuda":
        measure.profile(f"{chosen[0]}, {found.pairs} pairs", contestants[chosen[0]])
    if device == "cpu":
        for process in contestants.values():
            process.close()

    llm = llm or random_llm(device)
    weights, head = linear_weights(llm), llm.lm_head.weight.numel()
    tokens = QUERIES / 2.8 + PARTS[1] + QUERIES + PARTS[2] + found.new - 1
    floor = peak_flops(device, llm.dtype) / (2 * weights * tokens + 2 * head * found.new)
    size = f"{(weights + 2 * head) / 1e6:,.0f}M parameters, {str(llm.dtype)[6:]}, {found.pairs} pairs, {found.new} new"
    pace = {name: [count[name] / s for s in times] for name, times in seconds.items()}
    rows = measure.pace_rows("generation", size, device, pace, "pairs/s", floor)
    for ours in [name for name in chosen if name.startswith("ours")]:
        for name in [name for name in chosen if not name.startswith("ours")]:
            value, note = measure.ratio(pace[ours], pace[name])
            rows.append(measure.row(f"generation: {ours} against {name}", size, device, value, "x", note=note))
    measure.publish(rows)


if __name__ == "__main__":
    main()

"""The Triton kernels against float64, in Triton's interpreter on a CPU, or on a GPU.

TRITON_INTERPRET=1 python -m pytest tests/triton_kernels.py
VDG_TEST_GPU=1 python -m pytest tests/triton_kernels.py         # on a GPU; bench/gpu.sh does
"""

import pytest
import torch
from test_contrastive import errors, two_terms
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vdg_align
from common import decode
from kernels import best_lists, contrastive_torch, contrastive_triton, decoding, rows
from kernels import similarity_topk as topk
from kernels.contrastive import hn_nce, hn_nce_reference, l_tcc
from kernels.similarity_topk import exact_topk, similarity_topk, similarity_topk_reference
from kernels.topk_blocks import topk_in_blocks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
assert DEVICE == "cuda" or topk.INTERPRET, "set TRITON_INTERPRET=1, or on a GPU VDG_TEST_GPU=1"


def unit(n, d, seed):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=1)


@pytest.fixture
def used(monkeypatch):
    """Names of the Triton functions that ran."""
    names = set()
    for module, name in (
        (topk, "_propose_triton"),
        (contrastive_triton, "statistics"),
        (contrastive_triton, "gradient"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: names.add(name) or real(*a))
    return names


# ---- top-k ----


@pytest.mark.parametrize(
    "n, m, d, k", [(1, 1, 1, 1), (3, 70, 5, 2), (35, 131, 33, 20), (40, 130, 40, 40), (5, 9, 70, 20)]
)
def test_topk_equals_float64(used, n, m, d, k):
    queries, gallery = unit(n, d, 0).float().to(DEVICE), unit(m, d, 1).float().to(DEVICE)
    exclude = torch.arange(n, device=DEVICE) % (m + 1) - 1
    for own in (None, exclude):
        scores, indices = similarity_topk(queries, gallery, k, own)
        wanted = similarity_topk_reference(queries, gallery, k, own)
        assert torch.equal(indices, wanted[1]) and torch.equal(scores, wanted[0].float())
    assert used == {"_propose_triton"}


@pytest.mark.parametrize("scale", [1e-22, 1e-6, 1.0, 1e6])
def test_topk_of_duplicates_ties_and_any_scale(scale):
    gallery = unit(150, 48, 2).float()
    gallery[40:90] = gallery[3]  # more copies than K': no certificate
    gallery[100:110] = gallery[3] * (1 + 1e-6)
    gallery = (gallery * scale).to(DEVICE)
    itself = torch.arange(150, device=DEVICE)
    scores, indices = exact_topk(gallery, gallery, 20, itself)
    wanted = similarity_topk_reference(gallery, gallery, 20, itself)
    assert torch.equal(indices, wanted[1]) and torch.equal(scores, wanted[0])


@pytest.mark.parametrize("room", [2, 128])
@pytest.mark.parametrize("n, d, k, tile", [(150, 33, 5, 64), (130, 48, 20, 32), (70, 16, 40, 4096), (3, 7, 2, 64)])
def test_topk_of_a_gallery_by_the_upper_triangle_of_its_tiles(n, d, k, tile, room, monkeypatch):
    """Tiles written and absorbed along their rows and down their columns, as from D = TILE_WIDTH on. With room for two
    offers to a list, most tiles are read again."""
    monkeypatch.setattr(topk, "TILE_WIDTH", 1)
    monkeypatch.setattr(best_lists, "OFFERS", room)
    tiles = []
    monkeypatch.setattr(best_lists, "absorb", lambda *a, real=best_lists.absorb: tiles.append(a[1]) or real(*a))
    gallery = unit(n, d, 5).float()
    gallery[n // 2 : n // 2 + 9] = gallery[0]
    gallery = gallery.to(DEVICE)
    for own in (None, torch.arange(n, device=DEVICE)):
        scores, indices = exact_topk(gallery, gallery, k, own, tile)
        wanted = similarity_topk_reference(gallery, gallery, k, own)
        assert torch.equal(indices, wanted[1]) and torch.equal(scores, wanted[0])
    assert any(tiles) or n <= 128, "no tile served its columns"


@pytest.mark.parametrize("n, k, tile", [(300, 5, 128), (520, 5, 256)])
def test_lists_that_are_full_take_what_is_better_and_nothing_needs_a_second_look(n, k, tile, monkeypatch):
    """Columns of full lists are offered scores; a wrong list would show as a row without certificate."""
    monkeypatch.setattr(topk, "TILE_WIDTH", 1)
    monkeypatch.setattr(topk, "_rescan", None)
    gallery = unit(n, 16, 5).float().to(DEVICE)
    itself = torch.arange(n, device=DEVICE)
    scores, indices = exact_topk(gallery, gallery, k, itself, tile)
    wanted = similarity_topk_reference(gallery, gallery, k, itself)
    assert torch.equal(indices, wanted[1]) and torch.equal(scores, wanted[0])


@pytest.mark.parametrize("room", [4, 16])
def test_offers_of_a_tile_to_its_columns(room, monkeypatch):
    """Columns that are offered nothing, as much as there is room for, one more, and all; lists that hold something."""
    monkeypatch.setattr(best_lists, "OFFERS", room)
    n, width, generator = 40, 6, torch.Generator().manual_seed(3)
    s = torch.rand(n, 5, generator=generator)
    for column, count in enumerate((0, room, room + 1, n, 1)):
        s[count:, column] -= 2
    held = torch.linspace(-1, -0.5, width).repeat(5, 1)
    columns = held.clone().to(DEVICE), torch.arange(width, dtype=torch.int32, device=DEVICE).repeat(5, 1)
    rows = (
        torch.full((n, width), -torch.inf, device=DEVICE),
        torch.full((n, width), -1, dtype=torch.int32, device=DEVICE),
    )
    best_lists.absorb(rows, columns, s.to(DEVICE), (200, 100))
    values, order = torch.cat([held, s.T], 1).topk(width, dim=1)
    found, places = columns[0].cpu().sort(dim=1, descending=True)
    assert torch.equal(found, values)
    wanted = torch.where(order < width, order, order - width + 100)
    assert torch.equal(columns[1].cpu().gather(1, places).long(), wanted)
    assert torch.equal(rows[0].cpu().sort(dim=1, descending=True).values[:, :5], s.sort(dim=1, descending=True).values)


@pytest.mark.parametrize("kind", ["no order", "rising", "one value"])
def test_lists_begin_below_their_best_scores(kind):
    """floor() is below the `width` best scores of a row and above most others; then absorb() finds just those."""
    n, m, width = 3, 1000, 20
    s = torch.randn(n, m, generator=torch.Generator().manual_seed(1))
    s = {"no order": s, "rising": s.sort(1).values, "one value": s * 0 + 0.5}[kind]
    s[0, ::2] = -torch.inf
    s[1, 5] = 0.5  # two equal scores
    best = s.topk(width, dim=1).values
    floor = best_lists.floor(s.to(DEVICE), width)
    assert (floor.cpu() < best[:, -1]).all()
    if kind == "no order":
        assert ((s > floor.cpu()[:, None]).sum(1) < 2 * width).all()
    lists = floor[:, None].repeat(1, width), torch.full((n, width), -1, dtype=torch.int32, device=DEVICE)
    best_lists.absorb(lists, None, s.to(DEVICE), (7, 0))
    values, names = (x.cpu() for x in lists)
    assert torch.equal(values.sort(dim=1, descending=True).values, best)
    assert torch.equal(s.gather(1, names.long() - 7), values)  # and each has its own name
    assert all(len(set(row)) == width for row in names.tolist())


@pytest.mark.parametrize("rows, columns", [(64, 50), (200, 7)])
def test_topk_in_blocks_of_a_gallery_on_the_host(rows, columns):
    """On CUDA the next block is copied while one is worked on."""
    gallery = unit(200, 40, 9).float()
    gallery[90:120] = gallery[3]
    wanted = similarity_topk_reference(gallery, gallery, 9, torch.arange(200))
    lots = list(topk_in_blocks(gallery, range(200), 9, rows, columns, torch.device(DEVICE)))
    assert torch.equal(torch.cat([lot[2] for lot in lots]).cpu(), wanted[1])
    assert torch.equal(torch.cat([lot[1] for lot in lots]).cpu(), wanted[0])


@pytest.mark.parametrize("d", [1, 2, 3, 5, 64, 100, 257, 768, 2048])
def test_exact_scores_have_the_bits_of_exact_dot(d):
    queries, gallery = unit(20, d, 6).float().to(DEVICE), unit(30, d, 7).to(DEVICE).half()
    rows, columns = torch.arange(50, device=DEVICE) % 20, torch.arange(50, device=DEVICE) * 7 % 30
    found = topk._exact_triton(queries, gallery, rows, columns)
    assert torch.equal(found, topk.exact_dot(queries[rows], gallery[columns]))


def test_error_of_a_proposal_is_within_its_bound():
    queries, gallery = unit(40, 300, 3).float().to(DEVICE), (unit(90, 300, 4) * 7).float().to(DEVICE)
    lengths = topk._lengths(queries), topk._lengths(gallery)
    approximate, columns, bound = topk._propose_triton(queries, gallery, lengths, 32, None, False, 64)
    exact = (queries.double() @ gallery.double().T).gather(1, columns)
    error = (approximate.double() - exact).abs().amax(1)
    assert (error <= bound).all() and error.max() > 1e-6  # fp16 it is
    assert (bound < 50 * error.mean()).all()  # and the bound is of some use


# ---- HN-NCE ----


def value_and_gradients(loss, *inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def close(found, wanted, tolerance, plain=None):
    """plain: what plain PyTorch makes of it in fp32; where that loses much, on this machine, so may the kernel.

    At tau = 0.01 a logit of 60 is rounded by 4e-6, which exp turns into as large a relative error."""
    if plain is not None:
        tolerance += 4 * max(errors(plain, wanted))
    assert max(errors(found, wanted)) <= tolerance, (errors(found, wanted), tolerance)


@pytest.mark.parametrize("alpha, beta, tau", [(1.0, 0.0, 0.07), (1.0, 0.5, 0.07), (1.0, 0.5, 0.01), (0.5, 0.25, 0.1)])
@pytest.mark.parametrize("n, m, d", [(7, 7, 6), (37, 70, 33), (50, 41, 257)])  # the last: shared positives, strips
def test_hn_nce_with_uneven_incoming_gradients(used, n, m, d, alpha, beta, tau, monkeypatch):
    monkeypatch.setattr(contrastive_triton, "STRIP", 13 * m)
    monkeypatch.setattr(contrastive_triton, "STRIP_TILES", 1)
    generator = torch.Generator().manual_seed(n)
    positive = torch.randperm(m, generator=generator)[:n] if n <= m else torch.randint(m, (n,), generator=generator)
    weight = torch.randn(2, n, generator=generator, dtype=torch.float64)

    def run(function, dtype, device):
        x, c = (t.to(device, dtype).requires_grad_() for t in (unit(n, d, 10), unit(m, d, 11)))
        t = torch.tensor(tau, dtype=dtype, device=device, requires_grad=True)
        rows, columns = function(x, c, positive.to(device), t, alpha, beta)
        w = weight.to(device, dtype)
        return rows, columns, *torch.autograd.grad((w[0] * rows).sum() + (w[1] * columns).sum(), (x, c, t))

    wanted = run(hn_nce_reference, torch.float64, "cpu")
    close(run(hn_nce, torch.float32, DEVICE), wanted, 1e-5, run(hn_nce_reference, torch.float32, "cpu"))
    assert used == {"statistics", "gradient"}


@pytest.mark.parametrize("beta, scale", [(0.5, 100.0), (0.25, 20.0), (0.0, 20.0)])
@pytest.mark.parametrize(
    "n, m, bank, first_row, first_column, labels",
    [
        (5, 33, 0, 0, 0, (7, 0)),  # fewer rows than a tile, one column more than a tile
        (16, 32, 0, 0, 0, (7, 0)),  # whole tiles
        (29, 97, 3, 13, 35, (7, 0)),  # both borders within a tile
        (9, 70, 2, 9, 1, (7, 0)),  # one group of rows; in a group of one column, its row's positive
        (6, 1, 0, 3, 0, (7, 0)),  # every row has that column as its positive: no negatives at all
        (60, 272, 7, 19, 16, (7, 0)),  # aligned columns, several strips of either group
        (17, 272, 0, 0, 0, (1, 113)),  # the last positive of a tile's rows in the first column of a tile
        (17, 272, 0, 0, 0, (1, 127)),  # the first positive of a tile's rows in the last column of a tile
    ],
)
def test_sums_of_strips_at_their_edges(n, m, bank, first_row, first_column, labels, beta, scale, monkeypatch):
    """(1 + beta) o + log S and beta o + log T of rows and columns in either group, of rows at very different levels."""
    monkeypatch.setattr(contrastive_triton, "STRIP", 17 * m)
    x, c = unit(n, 6, 50).float(), unit(m, 6, 51).float()
    label = torch.cat([torch.full((bank,), -1), (torch.arange(n - bank) * labels[0] + labels[1]) % m])
    x[bank:] += 2 * c[label[bank:]]  # a positive that is summed would be the largest of its row
    x[::3] *= 5

    def sums(module, dtype, device):
        inputs = x.to(device, dtype), c.to(device, dtype), label.to(device), bank, first_row, first_column
        return module.statistics(*inputs, torch.tensor(scale, dtype=dtype, device=device), beta)

    found = sums(contrastive_triton, torch.float32, DEVICE)
    again = sums(contrastive_triton, torch.float32, DEVICE)
    wanted = sums(contrastive_torch, torch.float64, "cpu")
    for got, same, want in zip(found, again, wanted, strict=True):
        assert torch.equal(got, same) and got.isfinite().all()
        got = got.cpu().double()
        if want is wanted[0]:  # the bank's rows have sums that nobody reads
            got, want = got[..., bank:], want[..., bank:]
        for i, power in ((1, 1 + beta), (2, beta))[: 1 + (beta > 0)]:
            assert torch.equal(got[:, i] == 0, want[:, i] == 0)
            there = want[:, i] > 0
            of_got, of_want = ((power * t[:, 0] + t[:, i].log())[there] for t in (got, want))
            torch.testing.assert_close(of_got, of_want, rtol=3e-6, atol=2e-5)


@pytest.mark.parametrize("d", [24, 260])
@pytest.mark.parametrize("n_human, k", [(20, 0), (33, 5), (1, 40), (50, 3)])
def test_l_tcc_with_bank(n_human, k, d, monkeypatch):
    monkeypatch.setattr(contrastive_triton, "STRIP", 9 * 50)
    monkeypatch.setattr(contrastive_triton, "STRIP_TILES", 2)

    def run(function, dtype, device):
        x, c = (unit(50, d, seed).to(device, dtype).T.contiguous().T.requires_grad_() for seed in (20, 21))  # strided
        tau = torch.tensor(0.05, device=device, dtype=dtype, requires_grad=True)
        bank = unit(k, d, 22).to(device, dtype) if k else None
        return value_and_gradients(function(x, c, n_human, tau, 1.0, 0.5, bank), x, c, tau)

    wanted = run(l_tcc, torch.float64, "cpu")
    close(run(l_tcc, torch.float32, DEVICE), wanted, 1e-5, run(two_terms, torch.float32, "cpu"))


@pytest.mark.parametrize("d", [24, 260])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.2e-2)])
def test_half_precision_inputs(dtype, tolerance, d):
    """The loss is that of the rounded inputs; gradients carry the rounding of dL/ds and of themselves."""
    x, c = (unit(70, d, seed).to(DEVICE, dtype).requires_grad_() for seed in (30, 31))
    found = value_and_gradients(1e-3 * l_tcc(x, c, 30, 0.02, 1.0, 0.5), x, c)
    results = {}
    for wide in (torch.float64, torch.float32):
        x, c = (t.detach().to("cpu", wide).requires_grad_() for t in (x, c))
        results[wide] = value_and_gradients(1e-3 * two_terms(x, c, 30, 0.02, 1.0, 0.5), x, c)
    wanted, plain = results.values()
    close(found[:1], wanted[:1], 1e-5, plain[:1])
    close(found[1:], wanted[1:], tolerance)
    assert found[1].dtype == dtype


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_step_is_captured_in_a_graph():
    x, c = (unit(96, 64, seed).float().to(DEVICE).requires_grad_() for seed in (40, 41))
    tau = torch.tensor(0.05, device=DEVICE, requires_grad=True)

    def step():
        return value_and_gradients(l_tcc(x, c, 40, tau, 1.0, 0.5), x, c, tau)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x += 0.1 * c
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.mem_get_info()[1] < 60 << 30, reason="needs a GPU of 64 GB")
def test_offsets_past_two_to_the_31():
    x = torch.nn.functional.normalize(torch.randn(1_100_000, 2048, device=DEVICE), dim=1)
    queries = x[-300:].clone()
    scores, indices = similarity_topk(queries, x, 5)
    assert torch.equal(indices[:, 0].cpu(), torch.arange(1_099_700, 1_100_000))


# ---- decoding ----

# what one rounding costs; the interpreter cuts bf16 off
ROUNDED = [(torch.float32, 4e-6), (torch.bfloat16, 2**-8 if DEVICE == "cuda" else 2**-7), (torch.float16, 2**-11)]


@pytest.mark.parametrize("dtype, error", ROUNDED)
@pytest.mark.parametrize("shape", [(2, 5, 3, 64), (7, 4, 6), (1, 1, 2, 128), (3, 2, 9, 96)])
def test_rotary_positions_and_their_gradient(shape, dtype, error):
    """Against Hugging Face's own function in float64, and its autograd."""
    generator = torch.Generator().manual_seed(1)
    # in memory heads lie before tokens, as attention gives them
    turned = (*shape[:-3], shape[-2], shape[-3], shape[-1])
    x, up = (torch.randn(turned, generator=generator).to(dtype).transpose(-3, -2) for _ in "ab")
    angles = torch.rand(shape[-3], 1, shape[-1] // 2, generator=generator) * 6
    cos, sin = (f(torch.cat([angles, angles], -1)).to(dtype) for f in (torch.cos, torch.sin))
    exact = x.double().requires_grad_()
    wanted = apply_rotary_pos_emb(exact, exact, cos.double(), sin.double(), unsqueeze_dim=0)[0]
    wanted = wanted.reshape(shape)
    wanted.backward(up.double())
    mine = x.to(DEVICE).requires_grad_()
    found = decoding.rotate(mine, cos.to(DEVICE), sin.to(DEVICE))
    found.backward(up.to(DEVICE))
    for got, want in ((found, wanted), (mine.grad, exact.grad)):
        assert got.dtype == dtype
        assert ((got.detach().cpu().double() - want.detach()).abs() <= error * (1 + want.abs())).all()


@pytest.mark.parametrize("dtype, error", ROUNDED)
@pytest.mark.parametrize(
    "n, heads, shared, d, last", [(3, 2, 1, 64, 0), (2, 3, 3, 32, 70), (1, 2, 4, 48, 63), (2, 1, 1, 128, 99)]
)
def test_attention_of_one_token(n, heads, shared, d, last, dtype, error):
    """Against float64 over the places written; what lies behind them, not a number, is not read."""
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(n, 2, heads * shared, d, generator=generator).to(dtype)[:, 1:]  # with a gap between rows
    cache = torch.randn(2, n + 2, 100, heads, d, generator=generator).to(dtype)
    k, v = (x[:n, : last + 1].double().repeat_interleave(shared, 2) for x in cache)
    weights = torch.einsum("bqhd,bshd->bhqs", q.double(), k).div(d**0.5).softmax(-1)
    wanted = torch.einsum("bhqs,bshd->bqhd", weights, v)
    cache[:, :, last + 1 :] = torch.nan
    keys, values = (x[:n] for x in cache.to(DEVICE))
    found = decoding.one_token_attention(q.to(DEVICE), keys, values, torch.tensor([last], device=DEVICE))
    assert found.dtype == dtype
    assert ((found.cpu().double() - wanted).abs() <= error * (1 + wanted.abs())).all()
    if heads > 1:
        one = torch.tensor([last], device=DEVICE)
        with pytest.raises(AssertionError):
            decoding.one_token_attention(q.to(DEVICE), keys.transpose(1, 2), values.transpose(1, 2), one)


@pytest.mark.parametrize("place", [int, torch.tensor])
def test_a_token_at_a_time_gives_what_the_whole_sequence_gives(place):
    """Against Hugging Face's own LLaMA, heads of queries shared by half as many of keys; place: as a number, or as the
    tensor that a captured step counts up."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    llm = LlamaForCausalLM(config).eval().requires_grad_(False).to(DEVICE)
    x = torch.randn(3, 7, 32, device=DEVICE)
    wanted = llm(inputs_embeds=x).logits
    cache = decode.make_cache(llm, 4, 9)
    found = [decode.feed(llm, x[:, :3], cache, 0)]
    for i in range(3, 7):
        start = place(i) if place is int else place(i, device=DEVICE)
        found.append(decode.feed(llm, x[:, i : i + 1], cache, start))
    torch.testing.assert_close(torch.stack(found, 1), wanted[:, 2:], rtol=1e-4, atol=1e-4)


# ---- taken rows ----


@pytest.mark.parametrize("dtype, error", [*ROUNDED, (torch.float64, 1e-14)])
@pytest.mark.parametrize("n, heads, d, often", [(1, 1, 1, 1), (9, 3, 7, 64), (5, 2, 800, 9), (30, 1, 256, 8)])
def test_taken_rows_and_their_gradients(n, heads, d, often, dtype, error):
    """Rows taken often, once and never; gradients with gaps in memory. Against float64, and twice the same bits."""
    generator = torch.Generator().manual_seed(n)
    index = torch.cat([torch.randint(n, (2, n), generator=generator), torch.full((2, often), n // 2)], 1)
    index[index == n // 3] = 0
    x = torch.randn(n, heads, d, generator=generator).to(dtype)
    up = torch.randn(*index.shape[::-1], heads, d, generator=generator).to(dtype).transpose(0, 1)
    exact = up.double().flatten(0, 1)
    wanted = torch.zeros(n, heads, d, dtype=torch.float64).index_add(0, index.flatten(), exact)
    summed = torch.zeros_like(wanted).index_add(0, index.flatten(), exact.abs())
    gather, found = rows.Gather(index.to(DEVICE), n), []
    for _ in range(2):
        mine = x.to(DEVICE, copy=True).requires_grad_()
        taken = gather(mine)
        taken.backward(up.to(DEVICE))
        assert torch.equal(taken.detach().cpu(), x[index])
        found.append(mine.grad)
    assert torch.equal(*found) and found[0].dtype == dtype
    assert ((found[0].cpu().double() - wanted).abs() <= error * wanted.abs() + min(error, 1e-6) * summed).all()
    assert ("places" in vars(gather)) == (dtype != torch.float64)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_taken_rows_of_a_batch_of_captions(checkpoint, monkeypatch):
    """Loss and gradients as F.embedding gives them: a shared instruction, a shared image, rows of different length."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 40}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2)
    llm = LlamaForCausalLM(config).eval().requires_grad_(False).to(DEVICE)
    results = []
    for by_kernel in (True, False):
        made = []
        monkeypatch.setattr(rows, "takes_kernels", lambda x, by_kernel=by_kernel: by_kernel)
        monkeypatch.setattr(vdg_align, "Gather", lambda *a, made=made: made.append(rows.Gather(*a)) or made[-1])
        images = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        first, *others = images.unbind()
        prompts = [[[1, 7, 8], first, [9], image] for image in (*others, *others[:1])]
        batch = vdg_align.pack(llm.get_input_embeddings(), prompts, [[5, 6, 7, 2], [5, 2], [9] * 14 + [2]])
        loss = vdg_align.caption_loss(llm, batch, 7, checkpoint)
        loss.backward()
        results.append((loss.detach(), images.grad))
        assert ["places" in vars(gather) for gather in made] == [by_kernel] * 2
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-5 * results[1][1].abs().max().item())


@pytest.mark.skipif(DEVICE == "cpu" or torch.cuda.mem_get_info()[1] < 60 << 30, reason="needs a GPU of 64 GB")
def test_gradients_of_taken_rows_past_two_to_the_31():
    many = 450_000
    for index, n in ((torch.arange(many) % 8, 8), (torch.arange(many - 3, many), many)):
        x = torch.zeros(n, 40, 128, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        up = torch.zeros(len(index), 40, 128, dtype=torch.bfloat16, device=DEVICE)
        up[-3:] = torch.tensor([1, 2, 3], device=DEVICE)[:, None, None]
        rows.Gather(index.to(DEVICE), n)(x).backward(up)
        wanted = torch.zeros(n).index_add(0, index[-3:], torch.tensor([1.0, 2, 3]))
        assert torch.equal(x.grad.amax((1, 2)).float().cpu(), wanted)
        assert torch.equal(x.grad.amin((1, 2)).float().cpu(), wanted)

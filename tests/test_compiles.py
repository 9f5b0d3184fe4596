"""Every Triton kernel compiles for GPUs that are not here: the interpreter, which runs them in the other tests, takes
more than the compiler does (a variable whose type changes in a branch, say)."""

import re
import subprocess
from pathlib import Path

import pytest
import torch  # noqa: F401  before triton
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels import best_lists, contrastive_triton, decoding, rows, similarity_topk

LISTS = {"WIDTH": 48, "LANES": 64, "OFFERS": 128}
ROWS = {**LISTS, "ROWS": 1, "COLUMNS": 128}
STRIP = {"BETA": 0.5, "ROWS": 16, "COLUMNS": 128}
HALF, REAL = "*fp16", "*fp32"
# kernel -> (types of its pointers and numbers, i32 where none is given; its constants), once for each variant
KERNELS = [
    (best_lists._absorb_kernel, {"counts": "*i32"}, ROWS | {"OFFER": True, "LATE": False}),
    (best_lists._absorb_kernel, {"counts": "*i32"}, ROWS | {"OFFER": True, "LATE": False, "column_step": 1}),
    (best_lists._absorb_kernel, {"counts": "*i32"}, ROWS | {"OFFER": False, "LATE": False}),
    (best_lists._absorb_kernel, {"counts": "*i32"}, ROWS | {"OFFER": False, "LATE": True}),
    (best_lists._merge_kernel, {"counts": "*i32"}, {**LISTS, "ROWS": 4}),
    (decoding._rotate_kernel, {"x": HALF, "cos": HALF, "sin": HALF, "out": HALF, "sign": "fp32"},
     {"ROWS": 8, "HALF": 64}),
    (decoding._one_token_kernel, {"q": HALF, "keys": HALF, "values": HALF, "out": HALF, "last": "*i64"},
     {"GROUP": 1, "WIDTH": 128, "PLACES": 16}),
    (decoding._one_token_kernel, {"q": HALF, "keys": HALF, "values": HALF, "out": HALF, "last": "*i64"},
     {"GROUP": 8, "WIDTH": 128, "PLACES": 16}),
    (rows._add_up_kernel, {"grads": HALF, "out": HALF, "places": "*i64", "first": "*i64"},
     {"PLACES": 8, "COLUMNS": 1024}),
    (similarity_topk._propose_kernel, {"queries": HALF, "gallery": HALF, "exclude": "*i64"},
     {"WIDTH": 32, "LANES": 32, "ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "UPCAST": False}),
    (similarity_topk._exact_kernel, {"rows": "*i64", "columns": "*i64", "leaves": "*i32", "scores": "*fp64"},
     {"LEVELS": 8, "PAIRS": 16}),
    (contrastive_triton._sums_kernel, {"rows": HALF, "columns": HALF},
     {"BETA": 0.5, "ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "UPCAST": False}),
    (contrastive_triton._strip_sums_kernel, {}, {**STRIP, "STAGES": 3}),
    (contrastive_triton._merge_kernel, {}, {"BETA": 0.5, "PARTS": 8, "COLUMNS": 128}),
    (contrastive_triton._flash_gradient_kernel, {"rows": HALF, "columns": HALF},
     {"BETA": 0.5, "ROWS": 64, "COLUMNS": 64, "WIDTH": 64, "UPCAST": False}),
    (contrastive_triton._strip_gradient_kernel, {"g": HALF}, STRIP),
]  # fmt: skip
POINTERS = {
    "scores", "values", "columns", "indices", "offers", "kth_of_columns", "queries", "gallery", "rows", "scale",
    "label", "row_out", "column_out", "row_vectors", "column_vectors", "row_label", "column_label", "row_own",
    "column_own", "s", "g", "out", "parts", "whole",
}  # fmt: skip
WHOLE = {"label": "*i64", "row_label": "*i64", "column_label": "*i64", "indices": "*i32"}


def compiled(kernel, types: dict, constants: dict, capability: int, warps: int = 4, aligned: bool = False) -> bytes:
    """The cubin of a kernel; aligned: all addresses and numbers are multiples of 16."""
    names = [parameter.name for parameter in kernel.params]
    if kernel.__module__ == best_lists.__name__:
        types = types | {"columns": "*i32"}
    numbers = {"_rotate_kernel": {"rows"}}.get(kernel.__name__, set())  # rows counts here
    usual = {name: WHOLE.get(name, REAL) for name in POINTERS - numbers}
    signature = {name: "constexpr" if name in constants else (usual | types).get(name, "i32") for name in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    known = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if aligned and name not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=known)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps}).asm["cubin"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("case", range(len(KERNELS)), ids=lambda i: f"{KERNELS[i][0].__name__}-{i}")
def test_kernel_compiles(case, capability):
    assert compiled(*KERNELS[case], capability)


@pytest.mark.parametrize("capability", [80, 90])
def test_sums_of_a_strip_spill_no_registers(capability, tmp_path):
    """As they are launched: the committed tile in its warps, numbers and addresses that are multiples of 16."""
    rows, columns, warps, stages = contrastive_triton.TILES[capability // 10, 0]["strip sums"]
    constants = {"BETA": 0.5, "ROWS": rows, "COLUMNS": columns, "STAGES": stages}
    cubin = compiled(contrastive_triton._strip_sums_kernel, {}, constants, capability, warps, aligned=True)
    (tmp_path / "kernel.cubin").write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    said = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True, check=True)
    assert re.findall(r"STACK:(\d+)", said.stdout) == ["0"]


def test_no_kernel_is_left_out():
    modules = best_lists, decoding, rows, similarity_topk, contrastive_triton
    kernels = {f for module in modules for name, f in vars(module).items() if name.endswith("_kernel")}
    assert kernels == {kernel for kernel, _, _ in KERNELS}

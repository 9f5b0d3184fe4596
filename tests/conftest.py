"""What every test shares: the repository on sys.path, no network, no GPU, and one folder of tiny models a session.

The tests are those of a CPU, also on a machine that has a GPU, in this process and in the stages it starts.
VDG_TEST_GPU=1 leaves the GPU to them: tests/triton_kernels.py is meant for it, and bench/gpu.sh runs it so.
"""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when huggingface_hub is imported: must come first
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if os.environ.get("VDG_TEST_GPU") != "1":  # read once, when torch first asks for a GPU
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def zoo(tmp_path_factory) -> Path:
    """Folder with tiny random Hugging Face models: llama/ instructblip/ clip/ blip/ resnet/."""
    import zoo as writer

    root = tmp_path_factory.mktemp("zoo")
    writer.build(root)
    return root


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real annotation files and photographs beside the repository; tests that need them skip without them."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs real data in {folder}")
    return folder

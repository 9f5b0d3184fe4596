"""Calls that could run what a file holds, or hide a fault, stand nowhere in the repository, tests and benches included.

The check reads the syntax and not the text: a bug in a string of tests/mutations.py, or a word in a comment, is no
call. It is tried on made-up lines with each fault put in, then asked of every file."""

import ast
import functools
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

# What runs code that its argument holds; "load" of these modules, and of their classes, is one of them.
RUNS = {"eval", "exec", "os.system", "os.popen", "marshal.load", "marshal.loads", "shelve.open", "runpy.run_path"}
UNPICKLES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib"}
# a stage that the test wrote itself; lines of our own docs
MAY = {("tests/test_flags.py", "exec"), ("tests/test_features_elsewhere.py", "exec")}
MAY |= {("demo/as_released.py", "runpy.run_path")}  # a file of this repository, and no other
MAY |= {("common/decoders.py", "pickle.loads")}  # what its own parent, or child, sent over their socket
FALSE = {"trust_remote_code", "allow_pickle", "shell"}  # arguments that may have no other value


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def name_of(node: ast.expr) -> str:
    """ "torch.load" of the expression torch.load; "" of what is no dotted name."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *parts[::-1]]) if isinstance(node, ast.Name) else ""


def imported(tree: ast.AST) -> dict[str, str]:
    """What a name stands for, where it was imported: {"load": "pickle.load", "np": "numpy"}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def safe_loads(tree: ast.AST) -> set[int]:
    """The expressions torch.load that are called with weights_only=True."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {
        id(call.func)
        for call in calls
        for word in call.keywords
        if word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
    }


def unsafe(text: str) -> Iterator[tuple[int, str]]:
    """(line, fault) of a program."""
    tree = ast.parse(text)
    names, safe = imported(tree), safe_loads(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            yield node.lineno, "a bare except"
        if isinstance(node, ast.Attribute | ast.Name):
            first, _, rest = name_of(node).partition(".")
            full = ".".join(filter(None, [names.get(first, first), rest]))
            if full == "torch.load" and id(node) not in safe:
                yield node.lineno, "torch.load without weights_only=True"
            module, _, last = full.rpartition(".")
            if full in RUNS or (module in UNPICKLES and last in ("load", "loads", "Unpickler")):
                yield node.lineno, full
        given = []
        if isinstance(node, ast.Call):
            given = [(word.arg, word.value) for word in node.keywords]
            if isinstance(node.func, ast.Attribute) and node.func.attr == "load_state_dict":
                strict = [word for word in node.keywords if word.arg == "strict"]
                if len(node.args) > 1 or any(is_false(word.value) for word in strict):
                    yield node.lineno, "load_state_dict that is not strict"
        elif isinstance(node, ast.Dict):
            given = [(key.value, value) for key, value in zip(node.keys, node.values, strict=True) if is_text(key)]
        for argument, value in given:
            if argument in FALSE and not is_false(value):
                yield value.lineno, f"{argument} that is not False"


def is_text(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def programs(root: Path) -> list[Path]:
    hidden = {file for file in root.rglob("*.py") if any(p.startswith(".") for p in file.relative_to(root).parts)}
    return sorted(set(root.rglob("*.py")) - hidden - set((root / "out").rglob("*.py")))


@pytest.mark.parametrize(
    "line, fault",
    [
        ("AutoModel.from_pretrained(folder, trust_remote_code=True)", "trust_remote_code that is not False"),
        ("how = {'trust_remote_code': True}", "trust_remote_code that is not False"),
        ("AutoModel.from_pretrained(folder, trust_remote_code=given)", "trust_remote_code that is not False"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("from torch import load as read\nread(path)", "torch.load without weights_only=True"),
        ("read = torch.load", "torch.load without weights_only=True"),
        ("import pickle as p\np.load(file)", "pickle.load"),
        ("from pickle import loads\nloads(data)", "pickle.loads"),
        ("pickle.Unpickler(file).load()", "pickle.Unpickler"),
        ("np.load(path, allow_pickle=True)", "allow_pickle that is not False"),
        ("model.load_state_dict(state, strict=False)", "load_state_dict that is not strict"),
        ("model.load_state_dict(state, False)", "load_state_dict that is not strict"),
        ("eval(text)", "eval"),
        ("os.system(text)", "os.system"),
        ("subprocess.run(text, shell=True)", "shell that is not False"),
        ("try:\n    pass\nexcept:\n    pass", "a bare except"),
    ],
)
def test_each_fault_is_seen(line, fault):
    assert {found for _, found in unsafe(line)} == {fault}


def test_what_is_sound_passes():
    lines = ["torch.load(path, weights_only=True)", "model.eval()", "zip(a, b, strict=False)", "json.load(file)"]
    lines += ["model.load_state_dict(state)", "x = 'pickle.load(file)'", "try:\n    pass\nexcept OSError:\n    pass"]
    lines += ["np.load(path, mmap_mode='r')", "pickle.UnpicklingError", "f(trust_remote_code=False)", "re.compile('x')"]
    assert not list(unsafe("\n".join(lines)))


def test_this_repository_has_none():
    found = [
        f"{file.relative_to(ROOT)}:{line}: {fault}"
        for file in programs(ROOT)
        for line, fault in unsafe(file.read_text(encoding="utf-8"))
        if (file.relative_to(ROOT).as_posix(), fault) not in MAY
    ]
    assert not found
    assert len(programs(ROOT)) > 100 and ROOT / "vdg_align.py" in programs(ROOT)


# ---- names of libraries ----

LIBRARIES = ("torch", "triton", "numpy", "transformers")


def missing(text: str) -> Iterator[tuple[int, str]]:
    """(line, name) of what a program takes from one of LIBRARIES and is not there: no test on a CPU runs torch.cuda."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        taken = []
        if isinstance(node, ast.Import):
            taken = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            taken = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in taken:
            if name.split(".")[0] in LIBRARIES and not exists(name.split(".")):
                yield node.lineno, name
    whole = {alias.name: alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names = imported(tree) | {name.split(".")[0]: name.split(".")[0] for name in whole}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and name_of(node):
            first, _, rest = name_of(node).partition(".")
            parts = f"{names.get(first, '')}.{rest}".split(".")
            if parts[0] in LIBRARIES and not exists(parts):
                yield node.lineno, ".".join(parts)


@functools.cache
def _module(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def exists(parts: list[str]) -> bool:
    """Whether ["torch", "cuda", "Stream"] is there. What a class or an object holds is not looked at."""
    found = _module(parts[0])
    for i, part in enumerate(parts[1:], 1):
        if not inspect.ismodule(found):
            return True
        found = getattr(found, part, None) or _module(".".join(parts[: i + 1])) or getattr(found, part, exists)
        if found is exists:
            return False
    return True


def test_a_name_that_is_not_there_is_seen():
    lines = "import torch\nimport torch.nn.functional as F\nimport triton.language as tl\nfrom torch import nn\n"
    lines += "torch.cuda.get_device_name()\nF.relu\ntl.where\nnn.Linear.no_such\ntorch.nn.utils.skip_init\nx.y.z\n"
    assert not list(missing(lines))
    lines += "torch.cuda.getdevice_name()\nF.reluu\ntl.wheer\nnn.Linaer(3)\n"
    lines += "def f():\n    from torch.profiler import NoSuch\n    import torch.no_such\n"
    assert sorted(name for _, name in missing(lines)) == [
        "torch.cuda.getdevice_name", "torch.nn.Linaer", "torch.nn.functional.reluu", "torch.no_such",
        "torch.profiler.NoSuch", "triton.language.wheer",
    ]  # fmt: skip


def test_names_of_libraries_are_there():
    """In the versions of requirements.txt, and of requirements-older.txt where they are installed."""
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in programs(ROOT)
        for line, name in missing(file.read_text(encoding="utf-8"))
    ]
    assert not found

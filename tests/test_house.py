"""The house itself: who may import whom, who may read a flag's constant, how long things may be.

Each check takes a folder and returns its faults, one line each, so that it can be tried on a small made-up house with
the fault put in; below them the same checks are asked of this repository.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT

from common.flags import read_flags

# A stage may import the stages before it.
STAGES = ("vdg_align", "vdg_tune", "mine_pairs", "gen_deltas", "train_cir", "eval_cir", "search")
FOLDERS = ("common", "kernels", "demo", "bench")
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTION_LINES, FILE_LINES, README_BYTES, HELP_WORDS = 100, 600, 14_000, 2
LONGER: dict[str, str] = {}  # files that may pass FILE_LINES, and why


# ---- reading the house ----
def modules_of(root: Path) -> dict[str, Path]:
    """Module name -> file, for the stages and all that lies in FOLDERS; tests are free."""
    files = [*root.glob("*.py"), *(file for folder in FOLDERS for file in (root / folder).rglob("*.py"))]
    found = {}
    for file in sorted(files):
        parts = file.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


class Import(NamedTuple):
    """One module of the house imported by another."""

    line: int
    module: str  # "common.files"
    name: str  # what is taken from it: "read_json"; "*" for everything, "" for the module itself
    local: str  # what it is called here


def imports_of(name: str, modules: dict[str, Path]) -> Iterator[Import]:
    """All imports of a module, those inside functions too; only what is of the house."""
    package = name if modules[name].name == "__init__.py" else name.rpartition(".")[0]

    def known(wanted: str) -> str:
        # a script finds the files beside it first: bench/mining.py imports measure
        beside = f"{package}.{wanted}" if package else wanted
        return beside if beside in modules else wanted if wanted in modules else ""

    for node in ast.walk(parse(modules[name])):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if module := known(alias.name):
                    yield Import(node.lineno, module, "", alias.asname or alias.name)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                if module := known(f"{source}.{alias.name}"):
                    yield Import(node.lineno, module, "", alias.asname or alias.name)
                elif module := known(source):
                    yield Import(node.lineno, module, alias.name, alias.asname or alias.name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            wanted = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
            if module := known(str(wanted)):
                yield Import(node.lineno, module, "*", "")


# ---- who imports whom ----
def import_circles(root: Path) -> list[str]:
    """A stage runs as __main__: a circle, even a lazy one, loads it a second time with classes of its own."""
    modules = modules_of(root)
    graph = {name: {entry.module for entry in imports_of(name, modules)} for name in modules}
    circles = {}

    def follow(path: list[str]) -> None:
        for after in sorted(graph[path[-1]]):
            if after == path[0]:
                circles.setdefault(frozenset(path), " -> ".join([*path, after]))
            elif after not in path and after > path[0]:  # each circle is found from its first name
                follow([*path, after])

    for name in modules:
        follow([name])
    return sorted(circles.values())


def forbidden_imports(root: Path) -> list[str]:
    """Stages import earlier stages only, common/ no stage, kernels/ only kernels/, and nothing imports demo/ or bench/
    but these two themselves."""
    modules = modules_of(root)
    faults = [
        f"{name}.py: no stage of this name; if it is one, give it its place in STAGES"
        for name, file in modules.items()
        if file.parent == root and name not in STAGES
    ]
    for name in modules:
        folder = name.split(".")[0]
        for line, module, _, _ in imports_of(name, modules):
            other = module.split(".")[0]
            wrong = {
                "a later stage": folder in STAGES and other in STAGES and STAGES.index(other) >= STAGES.index(folder),
                "a stage": folder == "common" and other in STAGES,
                "what is no kernel": folder == "kernels" and other != "kernels",
                f"of {other}/": other in ("demo", "bench") and folder not in ("demo", "bench"),
            }
            here = modules[name].relative_to(root)
            faults += [f"{here}:{line}: imports {module}, {what}" for what, found in wrong.items() if found]
    return faults


# ---- who reads a flag's constant ----
def flags_of(file: Path) -> set[str]:
    """The constants that `override(globals())` turns into flags; empty for a file that does not call it."""
    calls = (ast.unparse(node) for node in ast.walk(parse(file)) if isinstance(node, ast.Call))
    overrides = any(re.match(r"(flags\.)?override\(globals\(\)", call) for call in calls)
    return {flag.name for flag in read_flags(file)} if overrides else set()


def dotted(node: ast.expr) -> str:
    """ "a.b.c" of an attribute of names, else ""."""
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return node.id if isinstance(node, ast.Name) else ""


def uses_of_modules(tree: ast.AST, entries: list[Import]) -> Iterator[tuple[str, str, int]]:
    """(module, name, line) of each `module.name` below tree; name "*" where a module is handed on as a whole."""
    called = {entry.local: entry.module for entry in entries if not entry.name}
    whole = [node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            before = dotted(node.value)
            if before in called:
                yield called[before], node.attr, node.lineno
        elif isinstance(node, ast.Name) and node.id in called and not any(node is value for value in whole):
            yield called[node.id], "*", node.lineno


def defined_in(tree: ast.Module) -> dict[str, ast.AST]:
    """Name -> function, class or assignment at the top level of a file, inside if, try and with too."""
    found: dict[str, ast.AST] = {}
    todo = list(tree.body)
    while todo:
        node = todo.pop(0)
        if isinstance(node, FUNCTION | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                found |= {leaf.id: node for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
    return found


def bound_in(function: ast.AST) -> set[str]:
    """The names that a function or lambda binds for itself: parameters, assignments, functions inside; not imports."""
    names = {part.arg for part in ast.walk(function.args) if isinstance(part, ast.arg)}
    given = set()
    todo = list(function.body) if isinstance(function.body, list) else [function.body]
    while todo:
        node = todo.pop()
        if isinstance(node, FUNCTION | ast.ClassDef):
            names.add(node.name)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Global):
            given |= set(node.names)
        if not isinstance(node, ast.Lambda):
            todo += ast.iter_child_nodes(node)
    return names - given


def global_names(node: ast.AST, bound: frozenset[str] = frozenset()) -> Iterator[ast.Name]:
    """Each name read below a node that no function around it binds, so that it means one of the file's own."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id not in bound:
        yield node
    within = bound
    if isinstance(node, FUNCTION | ast.Lambda):
        for part in [*getattr(node, "decorator_list", ()), *node.args.defaults, *filter(None, node.args.kw_defaults)]:
            yield from global_names(part, bound)
        within = bound | bound_in(node)
        parts = node.body if isinstance(node.body, list) else [node.body]
    else:
        parts = ast.iter_child_nodes(node)
    for part in parts:
        yield from global_names(part, within)


def reachable(tree: ast.Module, roots: set[str]) -> dict[str, ast.AST]:
    """What of a file another file reaches by one of the roots, directly or through what uses what; never main()."""
    known = defined_in(tree)
    todo = sorted(known if "*" in roots else roots & known.keys())
    found: dict[str, ast.AST] = {}
    while todo:
        name = todo.pop()
        if name in found or name == "main":
            continue
        found[name] = known[name]
        todo += {used.id for used in global_names(known[name])} & known.keys()
    return found


def flags_read(node: ast.AST, flags: set[str]) -> Iterator[tuple[str, int]]:
    """(constant, line) of each read in a function, a class or a lambda of an assignment; `globals()` reads them all."""
    bodies = [node]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        bodies = [part for part in ast.walk(node) if isinstance(part, ast.Lambda)]
    for body in bodies:
        for name in global_names(body):
            if name.id in flags or (flags and name.id == "globals"):
                yield name.id, name.lineno


def constants_read(root: Path) -> list[str]:
    """An imported script keeps its own constants: a function that read them would ignore the importer's flags."""
    modules = modules_of(root)
    entries = {name: list(imports_of(name, modules)) for name in modules}
    trees = {name: parse(file) for name, file in modules.items()}
    flags = {name: flags_of(file) for name, file in modules.items()}
    roots: dict[str, set[str]] = {name: set() for name in modules}
    for name, tree in trees.items():
        for entry in entries[name]:
            roots[entry.module] |= {entry.name} - {""}
        for module, used, _ in uses_of_modules(tree, entries[name]):
            roots[module].add(used)
    faults = []
    for name, tree in trees.items():
        borrowed = {e.local: f"{e.module}.{e.name}" for e in entries[name] if e.name in flags[e.module]}
        for function, node in reachable(tree, roots[name]).items():
            found = list(flags_read(node, flags[name] | borrowed.keys()))
            if not isinstance(node, ast.Assign | ast.AnnAssign):
                uses = uses_of_modules(node, entries[name])
                found += [(f"{module}.{used}", line) for module, used, line in uses if used in flags[module]]
            here = modules[name].relative_to(root)
            faults += [f"{here}:{line}: {function} reads {borrowed.get(what, what)}" for what, line in found]
    return sorted(set(faults))


# ---- how long things are, and what flags say ----
def long_functions(root: Path) -> list[str]:
    faults = []
    for file in modules_of(root).values():
        for node in ast.walk(parse(file)):
            if isinstance(node, FUNCTION):
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    faults.append(f"{file.relative_to(root)}:{node.lineno}: {node.name} has {lines} lines")
    return faults


def long_files(root: Path, may: dict[str, str]) -> list[str]:
    """Files over FILE_LINES, less those that may; one that may and need not is a fault too."""
    faults = []
    for file in modules_of(root).values():
        here, lines = file.relative_to(root).as_posix(), len(file.read_text(encoding="utf-8").splitlines())
        if lines > FILE_LINES and here not in may:
            faults.append(f"{here}: {lines} lines, {FILE_LINES} at most")
        elif lines <= FILE_LINES and here in may:
            faults.append(f"{here}: {lines} lines; take its exception out")
    return faults


def long_readme(root: Path) -> list[str]:
    found = len((root / "README.md").read_bytes())
    return [f"README.md: {found:,} bytes, {README_BYTES:,} at most"] if found > README_BYTES else []


def flags_without_meaning(root: Path) -> list[str]:
    """A flag's comment is its --help: two words at the least, its source in brackets not counted."""
    faults = []
    for file in modules_of(root).values():
        names = flags_of(file)
        for flag in read_flags(file) if names else ():
            words = re.findall(r"[^\W\d_]{2,}", re.sub(r"\[[^\]]*\]", "", flag.help))
            if len(words) < HELP_WORDS:
                faults.append(f"{file.relative_to(root)}: {flag.name} says {flag.help!r} of itself")
    return faults


# ---- this repository ----
def test_no_import_circle():
    assert not import_circles(ROOT)


def test_imports_go_down():
    assert not forbidden_imports(ROOT)


def test_no_function_that_another_file_reaches_reads_a_constant():
    assert not constants_read(ROOT)


def test_no_function_is_too_long():
    assert not long_functions(ROOT)


def test_no_file_is_too_long():
    assert not long_files(ROOT, LONGER)


def test_the_readme_is_read_in_one_sitting():
    assert not long_readme(ROOT)


def test_every_flag_has_a_meaning():
    assert not flags_without_meaning(ROOT)
    assert sum(len(flags_of(file)) for file in modules_of(ROOT).values()) > 200  # the check finds them


# ---- the checks themselves, on a made-up house ----
STAGE = '''"""Stage."""
from common.flags import override
from common.files import read

# ---- data ----
LR = 1e-3  # learning rate, peak
SIZES = (1, 2)  # sizes of the layers
_HUB = "a/b"


class Model:
    def forward(self, x):
        return scaled(x, _HUB)


def scaled(x, LR):
    return x * LR


def table():
    return LR, SIZES


def main():
    print(table(), Model(), read(LR), globals())


if __name__ == "__main__":
    override(globals())
    main()
'''


@pytest.fixture
def house(tmp_path) -> Path:
    """A sound house: vdg_align and train_cir, eval_cir on train_cir, common/, kernels/, demo/, bench/, README.md."""
    files = {
        "vdg_align.py": STAGE,
        "train_cir.py": STAGE + "\n",
        "eval_cir.py": "import train_cir\n\n\ndef main():\n    return train_cir.Model(), train_cir.LR\n",
        "common/__init__.py": "",
        "common/flags.py": "def override(constants):\n    pass\n",
        "common/files.py": "from common import flags\n\n\ndef read(path):\n    return flags\n",
        "kernels/loss.py": "from kernels.tiles import SIZE\n\n\ndef loss():\n    return SIZE\n",
        "kernels/tiles.py": "SIZE = 4\n",
        "demo/report.py": "from demo import world\nfrom vdg_align import scaled\n",
        "demo/world.py": "",
        "bench/measure.py": "",
        "bench/loss.py": "import measure\n\n\ndef main():\n    import kernels.loss\n",
        "README.md": "# A house\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def change(house: Path, name: str, text: str, of: str = "") -> None:
    """Appends text to a file, or puts it in place of `of`."""
    before = (house / name).read_text()
    assert of in before
    (house / name).write_text(before.replace(of, text) if of else before + text)


def test_a_sound_house_has_no_fault(house):
    for check in (
        import_circles,
        forbidden_imports,
        constants_read,
        long_functions,
        long_readme,
        flags_without_meaning,
    ):
        assert check(house) == [], check
    assert long_files(house, {}) == []
    assert flags_of(house / "vdg_align.py") == {"LR", "SIZES"} and flags_of(house / "kernels/tiles.py") == set()


@pytest.mark.parametrize(
    "text",
    [
        "import eval_cir\n",
        "def late():\n    import eval_cir\n",
        "def late():\n    from eval_cir import main\n",
        "def late():\n    import importlib\n    importlib.import_module('eval_cir')\n",
        "if 0:\n    try:\n        import eval_cir as e\n    except ImportError:\n        pass\n",
    ],
)
def test_a_circle_is_seen(house, text):
    change(house, "train_cir.py", text)
    assert import_circles(house) == ["eval_cir -> train_cir -> eval_cir"]


def test_a_circle_of_three_and_one_inside_a_package_are_seen(house):
    change(house, "common/flags.py", "def late():\n    from common.console import warn\n")
    (house / "common/console.py").write_text("from . import files\n")
    assert import_circles(house) == ["common.console -> common.files -> common.flags -> common.console"]
    change(house, "bench/measure.py", "import loss\n")
    assert "bench.loss -> bench.measure -> bench.loss" in import_circles(house)


@pytest.mark.parametrize(
    "name, text, fault",
    [
        ("vdg_align.py", "def f():\n    import train_cir\n", ":32: imports train_cir, a later stage"),
        ("vdg_align.py", "from train_cir import Model\n", "imports train_cir, a later stage"),
        ("common/files.py", "def f():\n    from vdg_align import LR\n", "imports vdg_align, a stage"),
        ("kernels/loss.py", "from common.files import read\n", "imports common.files, what is no kernel"),
        ("train_cir.py", "from demo import world\n", "imports demo.world, of demo/"),
        ("common/flags.py", "import bench.measure\n", "imports bench.measure, of bench/"),
    ],
)
def test_an_import_upwards_is_seen(house, name, text, fault):
    change(house, name, text)
    (found,) = forbidden_imports(house)
    assert found.startswith(name) and found.endswith(fault)


def test_a_file_beside_the_stages_is_seen(house):
    (house / "helpers.py").write_text("")
    assert forbidden_imports(house)[0].startswith("helpers.py: no stage")


@pytest.mark.parametrize(
    "name, text, of, fault",
    [
        ("eval_cir.py", "train_cir.table()", "train_cir.Model()", "train_cir.py:21: table reads LR"),  # module.name
        ("eval_cir.py", "from train_cir import table\nimport", "import", "train_cir.py:21: table reads LR"),
        (
            "eval_cir.py",
            "import train_cir as t\n\n\ndef f():\n    return t.table",
            "import train_cir",
            "table reads LR",
        ),
        ("eval_cir.py", "vars(train_cir)", "train_cir.Model()", "train_cir.py:21: table reads LR"),  # handed on whole
        ("train_cir.py", "scaled(x, LR)", "scaled(x, _HUB)", "train_cir.py:13: Model reads LR"),  # a method
        ("train_cir.py", "table()", "scaled(x, _HUB)", "train_cir.py:21: table reads SIZES"),  # through a method
        ("train_cir.py", "globals()", "scaled(x, _HUB)", "train_cir.py:13: Model reads globals"),
        ("train_cir.py", "def forward(self, x=LR)", "def forward(self, x)", "train_cir.py:12: Model reads LR"),
        ("train_cir.py", "(lambda y, z=LR: y)(x)", "scaled(x, _HUB)", "train_cir.py:13: Model reads LR"),
        ("train_cir.py", "MODELS[x]()", "scaled(x, _HUB)", "train_cir.py:33: MODELS reads LR"),  # through a table
        ("train_cir.py", "later(x)", "scaled(x, _HUB)", "train_cir.py:37: later reads vdg_align.LR"),  # another stage's
        ("train_cir.py", "taken(x)", "scaled(x, _HUB)", "train_cir.py:41: taken reads vdg_align.SIZES"),
    ],
)
def test_a_constant_read_by_a_reachable_function_is_seen(house, name, text, of, fault):
    more = "\nMODELS = {'a': lambda: LR}\nimport vdg_align\n\ndef later(x):\n    return vdg_align.LR * x\n"
    change(house, "train_cir.py", more + "\ndef taken(x):\n    from vdg_align import SIZES as S\n    return S\n")
    assert constants_read(house) == []  # nobody reaches them
    change(house, name, text, of)
    assert any(found.endswith(fault) for found in constants_read(house)), constants_read(house)


def test_a_constant_read_for_main_alone_is_allowed(house):
    change(house, "train_cir.py", "def helper():\n    return table(), LR\n")
    change(house, "train_cir.py", "print(helper(), ", "print(")
    # names of its own: `helper` here is not the function above, LR not the flag
    own = "def scaled(x, helper):\n    for LR, table in x:\n        helper(LR, [table for table in table])"
    change(house, "train_cir.py", own, "def scaled(x, LR):\n    return x * LR")
    assert constants_read(house) == []
    change(house, "train_cir.py", "global LR, x", "helper(LR, [table for table in table])")
    assert constants_read(house) == []  # written, not read
    change(house, "train_cir.py", "global LR, x\n        x = LR", "global LR, x")
    assert constants_read(house) == ["train_cir.py:19: scaled reads LR"]


def test_a_long_function_is_seen(house):
    body = "        x = 1\n"
    change(house, "common/files.py", "class A:\n    async def fits(self):\n" + body * 99)
    assert long_functions(house) == []
    change(house, "common/files.py", "    def long(self):\n" + body * 100)
    assert long_functions(house) == ["common/files.py:107: long has 101 lines"]


def test_a_long_file_is_seen(house):
    (house / "kernels/loss.py").write_text("x = 1\n" * 700)
    assert long_files(house, {}) == ["kernels/loss.py: 700 lines, 600 at most"]
    assert long_files(house, {"kernels/loss.py": "why"}) == []
    (house / "kernels/loss.py").write_text("x = 1\n" * 600)
    assert long_files(house, {}) == []
    assert long_files(house, {"kernels/loss.py": "why"}) == ["kernels/loss.py: 600 lines; take its exception out"]


def test_a_long_readme_is_seen(house):
    (house / "README.md").write_bytes(b"x" * 14_000)
    assert long_readme(house) == []
    (house / "README.md").write_text("é" * 7_001)
    assert long_readme(house) == ["README.md: 14,002 bytes, 14,000 at most"]


@pytest.mark.parametrize("comment", ["", "  # rate", "  # [S6.1]", "  # rate [ours: a word]", "  # 3.5"])
def test_a_flag_that_says_nothing_is_seen(house, comment):
    change(house, "train_cir.py", "LR = 1e-3" + comment, "LR = 1e-3  # learning rate, peak")
    assert len(found := flags_without_meaning(house)) == 1 and found[0].startswith("train_cir.py: LR says")

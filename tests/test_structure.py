"""The house: data flow one way, no circles, one name per file, and what is known where."""

import ast
from collections import Counter, defaultdict
from pathlib import Path

import mbib_timm

PACKAGE = Path(mbib_timm.__file__).parent
# Folders in the order in which data flow: each imports from those before it alone.
ORDER = (
    "recipe", "data", "models", "methods", "results", "evaluation", "training", "sweeps", "analysis", "reporting",
    "inference", "publishing",
)  # fmt: skip
MODULES = {
    ".".join(("mbib_timm", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def imports(file: Path, everywhere: bool) -> set[str]:
    """Modules of the package that a file imports, in functions too or where it is imported alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{name.name}" for name in node.names]
            found |= {name if name in MODULES else node.module for name in full}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found & MODULES.keys()


def folder(module: str) -> str:
    """The folder that a module, or a package itself, is in; empty for what lies beside the folders."""
    return next((part for part in module.split(".")[1:2] if part in ORDER), "")


def test_data_flow_one_way():
    back = []
    for module, file in MODULES.items():
        if folder(module):
            later = ORDER[ORDER.index(folder(module)) + 1 :]
            back += [(module, name) for name in imports(file, everywhere=True) if folder(name) in later]
    assert not back


def test_the_picture_of_the_imports_is_true():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(ORDER)
    edges = {(folder(needed), folder(name)) for name, file in MODULES.items() for needed in imports(file, True)}
    edges = {(first, second) for first, second in edges if first and second and first != second}

    ways = set(edges)
    for _ in ORDER:
        ways |= {(a, c) for a, b in ways for d, c in edges if b == d}
    needed = {(a, c) for a, c in edges if not any((a, b) in ways and (b, c) in ways for b in ORDER)}
    text = (
        (Path(__file__).parents[1] / "CONTRIBUTING.md")
        .read_text(encoding="utf-8")
        .partition("```mermaid")[2]
        .partition("```")[0]
    )
    assert {tuple(line.split(" --> ")) for line in map(str.strip, text.splitlines()) if "-->" in line} == needed


def test_no_module_needs_itself():
    edges = {name: imports(file, everywhere=False) for name, file in MODULES.items()}
    while leaves := [name for name, needed in edges.items() if not needed & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, "these import one another in a circle, or what does"


def test_every_file_has_a_name_of_its_own():
    files = [path for path in PACKAGE.rglob("*") if path.suffix in {".py", ".j2", ".yaml"} and "zoo" not in path.parts]
    counts = Counter(path.name for path in files if path.name != "__init__.py")
    assert not [name for name, count in counts.items() if count > 1]


def test_only_models_know_the_names_of_their_heads():
    """Strings that are the name of a head of MBIB's: its network and its method define them."""
    named = defaultdict(list)
    for module, file in MODULES.items():
        # A revision on the Hub is called v1, v2, ... too.
        if folder(module) == "models" or module in ("mbib_timm.methods.mbib", "mbib_timm.publishing.publish"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in ("v", "v1", "v2", "v3", "z"):
                named[module].append(node.lineno)
    assert not named

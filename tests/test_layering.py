"""The shape of the package: imports point inwards, files are short, public names are explained."""

import ast
import importlib
import importlib.util
import inspect
import pathlib
import sys

import pytest

import orthax
import orthax.linalg.coefficients
import orthax.nn

PACKAGE = pathlib.Path(orthax.__file__).parent

# What the modules of a ring may import besides the standard library and themselves, innermost
# first. The most specific name decides.
ARRAYS = ("jax", "numpy", "scipy")
BASE = (*ARRAYS, "optax", "orthax.base")
FUNCTIONS = (*BASE, "orthax.linalg")
RINGS = {
    "orthax.base": (*ARRAYS, "optax"),
    "orthax.linalg": (*ARRAYS, "orthax.base"),
    "orthax.matrices": BASE,
    "orthax.penalties": (*ARRAYS, "orthax.base", "orthax.linalg"),
    "orthax.conv_penalties": (*ARRAYS, "orthax.base", "orthax.linalg"),
    "orthax.diagnostics": (*FUNCTIONS, "orthax.matrices"),
    "orthax.transforms": (*FUNCTIONS, "orthax.matrices"),
    "orthax.optimizers": (*FUNCTIONS, "orthax.matrices", "orthax.transforms"),
    "orthax.nn": (*FUNCTIONS, "orthax.matrices", "flax"),
    "orthax.eqx": (*FUNCTIONS, "orthax.matrices", "equinox"),
}
EVERY_RING = tuple(ring for ring in RINGS if ring not in ("orthax.nn", "orthax.eqx"))
RINGS["orthax"] = EVERY_RING

NAMESPACES = (
    orthax,
    orthax.linalg,
    orthax.linalg.coefficients,
    orthax.penalties,
    orthax.conv_penalties,
    orthax.diagnostics,
    orthax.nn,
)
if importlib.util.find_spec("equinox") is not None:  # not where the oldest versions are tested
    NAMESPACES += (importlib.import_module("orthax.eqx"),)

FILE_LINES = 300
OPTIMIZER_LINES = 120


def module_of(file):
    parts = ("orthax", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}

every_module = pytest.mark.parametrize(("module", "file"), list(MODULES.items()), ids=MODULES)


def imports(module, tree, *, is_package=False):
    """Full names of what a syntax tree imports; of `from a import b` it is `a.b`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{source}.{alias.name}" for alias in node.names)


def inside(name, ring):
    """Whether a module or a name in it belongs to a ring."""
    return name == ring or name.startswith(ring + ".")


def ring_of(module):
    return max((ring for ring in RINGS if inside(module, ring)), key=len)


def outward(module, names):
    """Those of the imported names that the module's ring may not use."""
    ring = ring_of(module)
    allowed = (*RINGS[ring], *sys.stdlib_module_names, *((ring,) if ring != "orthax" else ()))
    return [name for name in names if not any(inside(name, other) for other in allowed)]


def private(names):
    """Those of the imported names that another package keeps private."""
    return [
        name
        for name in names
        if not inside(name, "orthax") and any(part.startswith("_") for part in name.split("."))
        if not name.startswith("__future__.")
    ]


@every_module
def test_imports_point_inwards(module, file):
    tree = ast.parse(file.read_text())
    assert not outward(module, imports(module, tree, is_package=file.name == "__init__.py"))


@every_module
def test_nothing_private_of_another_package_is_used(module, file):
    tree = ast.parse(file.read_text())
    assert not private(imports(module, tree))
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "_src"]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("orthax.base.check", "from orthax.linalg.elementary import gram"),
        ("orthax.linalg.elementary", "import optax"),
        ("orthax.linalg.elementary", "from orthax.transforms.clip import clip_by_quantile"),
        ("orthax.linalg.elementary", "from orthax import diagnostics"),
        ("orthax.linalg.elementary", "from ..matrices.view import MatrixView"),
        ("orthax.matrices.view", "from orthax.linalg.elementary import gram"),
        ("orthax.penalties.gram", "from orthax.matrices.partition import as_matrices"),
        ("orthax.transforms.clip", "from orthax.optimizers.muon import muon"),
        ("orthax.transforms.clip", "from orthax import muon"),
        ("orthax.transforms.clip", "import orthax"),
        ("orthax.optimizers.muon", "def f():\n  import flax.nnx"),
        ("orthax.optimizers.muon", "import orthax.nn"),
        ("orthax", "from orthax import nn as nn"),
        ("orthax", "import flax"),
        ("orthax.nn", "import chex"),
        ("orthax.nn", "import equinox"),
        ("orthax", "from orthax import eqx"),
        ("orthax.eqx", "import orthax.nn"),
    ],
)
def test_an_outward_import_is_found(module, source):
    assert outward(module, imports(module, ast.parse(source)))


@pytest.mark.parametrize("source", ["from optax._src import base", "import jax._src.core"])
def test_a_private_import_is_found(source):
    assert private(imports("orthax.matrices", ast.parse(source)))


def test_imports_make_no_circle():
    pending = {
        module: {
            name if name in MODULES else name.rpartition(".")[0]
            for name in imports(module, ast.parse(file.read_text()))
            if inside(name, "orthax")
        }
        for module, file in MODULES.items()
        if file.name != "__init__.py"
    }
    while free := [module for module, needs in pending.items() if not needs & pending.keys()]:
        for module in free:
            del pending[module]
    assert not pending


@every_module
def test_a_file_is_short_enough_to_read_in_one_go(module, file):
    optimizer = inside(module, "orthax.optimizers") and module != "orthax.optimizers.parts"
    limit = OPTIMIZER_LINES if optimizer else FILE_LINES
    assert len(file.read_text().splitlines()) <= limit


# --- what is public, and what is private to a file


def test_no_file_or_folder_begins_with_an_underscore():
    parts = {part for file in PACKAGE.rglob("*.py") for part in file.relative_to(PACKAGE).parts}
    assert {part for part in parts if part.startswith("_")} == {"__init__.py"}


def private_of_another_file(module, source):
    return [
        name
        for name in imports(module, ast.parse(source))
        if inside(name, "orthax") and any(part.startswith("_") for part in name.split("."))
    ]


@every_module
def test_an_underscore_means_used_in_this_file_only(module, file):
    assert not private_of_another_file(module, file.read_text())


def test_the_import_of_a_private_name_is_found():
    assert private_of_another_file("orthax.matrices.view", "from orthax.base.leaves import _x")


every_namespace = pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda n: n.__name__)


@every_namespace
def test_a_namespace_shows_what_it_offers_and_nothing_else(namespace):
    public = namespace.__all__
    assert len(set(public)) == len(public)
    assert sorted(dir(namespace)) == sorted(public)
    assert all(hasattr(namespace, name) for name in public)


@every_namespace
def test_no_file_or_folder_shadows_a_public_function(namespace):
    inner = namespace.__name__ + "."
    files = {m.removeprefix(inner) for m in MODULES if m.startswith(inner)}
    functions = {n for n in namespace.__all__ if not inspect.ismodule(getattr(namespace, n))}
    assert not files & functions


PUBLIC = [
    pytest.param(getattr(namespace, name), id=f"{namespace.__name__}.{name}")
    for namespace in NAMESPACES
    for name in namespace.__all__
    if getattr(getattr(namespace, name), "__module__", "").startswith("orthax")
]


@pytest.mark.parametrize("value", PUBLIC)
def test_a_public_name_has_a_docstring(value):
    docstring = inspect.getdoc(value)
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ":"))


MUON = inspect.signature(orthax.muon).parameters


def unexplained(function):
    """The arguments that a docstring says nothing of, be it that muon's says it."""
    docstring, parameters = inspect.getdoc(function), inspect.signature(function).parameters
    by_muon = MUON if "as in `orthax.muon`" in docstring else ()
    for name, parameter in parameters.items():
        stars = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}
        said = f"\n  {stars.get(parameter.kind, '')}{name}: " in docstring
        if not said and name not in by_muon:
            yield name


@pytest.mark.parametrize("value", [p for p in PUBLIC if inspect.isfunction(p.values[0])])
def test_a_public_function_explains_its_arguments_and_what_it_returns(value):
    assert not list(unexplained(value))
    docstring = inspect.getdoc(value)
    assert "\nReturns:\n" in docstring or docstring.startswith("Returns ")


def test_an_argument_without_explanation_is_found():
    def undocumented(x, momentum):
        """Says nothing; the rest as in `orthax.muon`."""

    assert list(unexplained(undocumented)) == ["x"]


def test_help_of_an_optimizer_opens_with_its_arguments():
    signature = str(inspect.signature(orthax.muon))
    assert "<orthax.orthogonalize>" in signature
    assert "<function" not in signature

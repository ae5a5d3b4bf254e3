"""The shape of the package: imports point inwards, files are short, public names are explained."""

import ast
import importlib.util
import inspect
import pathlib
import sys
import types

import pytest

import orthax
import orthax.linalg.coefficients

PACKAGE = pathlib.Path(orthax.__file__).parent

# What the modules of a ring may import besides the standard library and themselves, innermost
# first. The most specific name decides; `orthax._` stands for the private modules of the package.
ARRAYS = ("jax", "numpy", "scipy")
VIEWS = ("orthax.linalg", "orthax._")
RINGS = {
    "orthax.linalg": ARRAYS,
    "orthax._": (*ARRAYS, "optax", "orthax.linalg"),
    "orthax.penalties": (*ARRAYS, *VIEWS),
    "orthax.conv_penalties": (*ARRAYS, *VIEWS),
    "orthax.diagnostics": (*ARRAYS, "optax", *VIEWS),
    "orthax.matrices": (*ARRAYS, "optax", *VIEWS),
    "orthax.transforms": (*ARRAYS, "optax", *VIEWS),
    "orthax.optimizers": (*ARRAYS, "optax", *VIEWS, "orthax.matrices", "orthax.transforms"),
    "orthax.nn": (*ARRAYS, "optax", "flax", *VIEWS, "orthax.matrices"),
}
EVERY_RING = tuple(ring for ring in RINGS if ring not in ("orthax._", "orthax.nn"))
RINGS["orthax"] = EVERY_RING

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
    return name == ring or name.startswith(ring if ring.endswith("_") else ring + ".")


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
        ("orthax.linalg._norms", "import optax"),
        ("orthax.linalg._norms", "from orthax.transforms import orthogonalize"),
        ("orthax.linalg._norms", "from orthax import matrices"),
        ("orthax.linalg._norms", "from .._views import MatrixView"),
        ("orthax._views", "from orthax.matrices import explain"),
        ("orthax.matrices", "from orthax.transforms import orthogonalize"),
        ("orthax.transforms.clip", "from orthax.optimizers import muon"),
        ("orthax.transforms.clip", "from orthax import muon"),
        ("orthax.transforms.clip", "import orthax"),
        ("orthax.optimizers.muon", "def f():\n  import flax.nnx"),
        ("orthax.optimizers.muon", "import orthax.nn"),
        ("orthax", "from orthax import nn as nn"),
        ("orthax", "import flax"),
        ("orthax", "from orthax._views import Packed"),
        ("orthax.nn", "import chex"),
    ],
)
def test_an_outward_import_is_found(module, source):
    assert outward(module, imports(module, ast.parse(source)))


@pytest.mark.parametrize("source", ["from optax._src import base", "import jax._src.core"])
def test_a_private_import_is_found(source):
    assert private(imports("orthax.matrices", ast.parse(source)))


@every_module
def test_a_file_is_short_enough_to_read_in_one_go(module, file):
    optimizer = inside(module, "orthax.optimizers") and not file.name.startswith("_")
    limit = OPTIMIZER_LINES if optimizer else FILE_LINES
    assert len(file.read_text().splitlines()) <= limit


def public_names(*namespaces):
    """Full name and value of everything public in some modules, other modules among it."""
    for namespace in namespaces:
        for name in getattr(namespace, "__all__", dir(namespace)):
            value = getattr(namespace, name)
            origin = getattr(value, "__module__", getattr(value, "__name__", ""))
            if not name.startswith("_") and origin.startswith("orthax"):
                yield f"{namespace.__name__}.{name}", value


SCALAR_FUNCTIONS = (orthax.penalties, orthax.conv_penalties, orthax.diagnostics)

every_public_name = pytest.mark.parametrize(
    "value",
    [
        pytest.param(value, id=name)
        for name, value in public_names(
            orthax,
            orthax.linalg,
            orthax.linalg.coefficients,
            orthax.matrices,
            *SCALAR_FUNCTIONS,
        )
    ],
)


@every_public_name
def test_a_public_name_has_a_docstring(value):
    docstring = inspect.getdoc(value)
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ":"))


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(value, id=name)
        for name, value in public_names(orthax, orthax.linalg, orthax.matrices, *SCALAR_FUNCTIONS)
        if isinstance(value, types.FunctionType)
    ],
)
def test_a_public_function_explains_its_arguments_and_what_it_returns(value):
    docstring = inspect.getdoc(value)
    for name, parameter in inspect.signature(value).parameters.items():
        stars = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}
        assert f"\n  {stars.get(parameter.kind, '')}{name}: " in docstring, name
    assert "\nReturns:\n" in docstring or docstring.startswith("Returns ")

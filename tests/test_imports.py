"""The house is held to its plan: who imports whom, and what no source may contain."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import loaders

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path
    for place in ("vae3d", "loaders", "train_3d.py", "evaluate.py")
    for path in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
)

# What each room may import beside itself: rooms above it in this table, never below.
ROOMS = {
    "loaders": set(),
    "recipes": set(),  # vae3d/recipes.py
    "ranges": set(),  # vae3d/ranges.py
    "mistakes": set(),  # vae3d/mistakes.py
    "stop": set(),  # vae3d/stop.py: signals
    "kernels": set(),
    "spectrum": {"kernels"},  # vae3d/spectrum.py
    "models": {"kernels"},
    "losses": {"models", "spectrum"},
    "weights": {"models", "ranges"},
    "exact": {"kernels", "models"},
    "spatial": {"kernels", "models", "losses"},
    "tracking": {"loaders"},
    "config": {"loaders", "models", "recipes", "ranges", "mistakes", "stop"},  # vae3d/config.py
    "reports": {"loaders", "tracking"},
    "inference": {"loaders", "spectrum", "kernels", "models", "exact", "tracking", "reports"},
    "training": {
        "loaders",
        "kernels",
        "models",
        "losses",
        "weights",
        "spatial",
        "tracking",
        "config",
        "ranges",
        "stop",
        "inference",
    },
    "stage2": {"loaders", "kernels", "models", "tracking", "training"},
    "proposal": {"loaders", "training"},  # vae3d/proposal.py
}
TOP = "commands"  # and the scripts, which stand beside them: they may import everything
DOOR = ("vae3d/models/custom_vae.py", "f'vae3d.weights.{file}'")  # see `custom_vae.door`
BY_NAME = ("vae3d/models/classes.py", "module")  # what a recipe names, see `import_class`

# Third-party libraries and the only places that may import them.
ONE_PLACE = {
    "jsonargparse": {"vae3d/config.py"},
    "wandb": {"vae3d/tracking/to_wandb.py"},
    "tensorboard": {"vae3d/tracking/to_tensorboard.py"},
    "mlflow": {"vae3d/tracking/to_mlflow.py"},
    "imageio": {"vae3d/tracking/media.py"},
    "imageio_ffmpeg": {"vae3d/tracking/media.py"},
    "torchio": {"loaders/preprocess.py"},
    "nibabel": {"loaders/readers/nifti.py"},
    "SimpleITK": {"loaders/readers/planes.py"},
    "pydicom": {"loaders/readers/planes.py"},
    "tifffile": {"loaders/readers/tiff.py"},
    "tensorstore": {"loaders/readers/arrays.py"},
    "fsspec": {"loaders/readers/remote.py"},
    "s3fs": set(),  # for fsspec to find
    "zarr": {"loaders/readers/remote.py"},
    "ngff_zarr": {"loaders/readers/ngff_writer.py"},
    "h5py": {"loaders/readers/arrays.py", "vae3d/losses/features.py"},
    "pint": {"loaders/readers/units.py"},
    "imagecodecs": set(),  # for tifffile to find
    "bioio": set(),  # its plugins are imported by name in loaders/readers/bio.py
    "blosc2": {"loaders/compressed.py"},
    "isal": {"loaders/readers/voxels.py"},
    "nilearn": {"loaders/demo.py"},
    "monai": {"vae3d/stage2/diffusion.py", "vae3d/losses/features.py"},
    "lightning": {"vae3d/training/lit.py"},
    "onnx": {"vae3d/inference/export.py"},
    "onnxruntime": {"vae3d/inference/export.py"},
    "onnxscript": {"vae3d/inference/export.py"},
    "huggingface_hub": {"vae3d/weights/hub.py"},
    "triton": {"vae3d/kernels/gpu.py"},
}


def imports(path: Path):
    """Yield (module, line) of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            for alias in node.names:  # of a package, its files
                file = ROOT.joinpath(*node.module.split("."), f"{alias.name}.py")
                inside = f"{node.module}.{alias.name}" if file.is_file() else node.module
                yield inside, node.lineno


def room(dotted: str) -> str | None:
    """The room of a module; None for the front door, `vae3d` itself, which imports on use alone."""
    parts = dotted.split(".")
    if dotted in ("vae3d", "vae3d.__init__"):
        return None
    name = parts[0] if parts[0] != "vae3d" else parts[1]
    return name if name in ROOMS else TOP


def dotted_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    here = room(dotted_name(path))
    if here in (None, TOP):
        pytest.skip("commands and the front door may import every room")
    for module, line in imports(path):
        if module.split(".")[0] in ("vae3d", "loaders", "train_3d", "evaluate"):
            there = room(module)
            allowed = there in (None, here) or there in ROOMS[here]
            assert allowed, f"{path.name}:{line}: {here} imports {module}, which it may not"


def test_the_table_of_rooms_has_no_way_back():
    seen = set()
    for name, below in ROOMS.items():
        assert below <= seen, f"{name} imports {below - seen}, which stand below it"
        seen.add(name)


def test_no_two_files_import_each_other_round_any_number_of_corners():
    modules = {dotted_name(path): path for path in SOURCES}
    graph = {
        name: {module for module, _ in imports(path) if module in modules} - {name}
        for name, path in modules.items()
    }
    order, open_ = [], []

    def visit(name: str) -> None:
        assert name not in open_, f"a circle: {' -> '.join([*open_[open_.index(name) :], name])}"
        if name in order:
            return
        open_.append(name)
        for other in sorted(graph[name] - {"vae3d", "loaders"}):
            visit(other)
        order.append(open_.pop())

    for name in graph:
        if name not in ("vae3d", "loaders"):  # front doors: their imports wait for use
            visit(name)
    assert len(order) >= len(modules) - 2


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_architecture_and_its_kernels_know_torch_einops_and_triton_alone(path):
    if room(dotted_name(path)) not in ("kernels", "models"):
        pytest.skip("another room")
    known = {*sys.stdlib_module_names, "torch", "einops", "vae3d", "triton"}
    assert {module.split(".")[0] for module, _ in imports(path)} <= known


def test_the_architecture_opens_one_door_to_its_weights():
    opened = [
        (path.relative_to(ROOT).as_posix(), ast.unparse(node.args[0]))
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if room(dotted_name(path)) in ("kernels", "models")
        and isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith("import_module")
    ]
    assert opened == [BY_NAME, DOOR]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_each_library_is_imported_in_its_one_place(path):
    name = path.relative_to(ROOT).as_posix()
    for module, line in imports(path):
        homes = ONE_PLACE.get(module.split(".")[0])
        assert homes is None or name in homes, f"{name}:{line} imports {module}; {homes} may"


def test_the_front_door_of_loaders_shows_type_checkers_the_names_that_it_opens():
    tree = ast.parse((ROOT / "loaders" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    shown = {(node.module, name.name) for node in block.body for name in node.names}
    assert shown == {(f"loaders.{module}", name) for name, module in loaders._HOME.items()}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_keep_the_rules_of_safety(path):
    assert path.name != "utils.py"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "a bare except"
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        where = f"{path.name}:{node.lineno}"
        if called == "torch.load":
            assert keywords.get("weights_only") == "True", f"{where} torch.load may run code"
        if called == "np.load":
            assert keywords.get("allow_pickle", "False") == "False", f"{where} unpickles"
        assert keywords.get("shell") != "True", f"{where} starts a shell"
        assert called not in ("pickle.load", "pickle.loads", "eval", "exec", "tempfile.mktemp")


@pytest.mark.parametrize("command", [["train_3d.py", "--help"], ["evaluate.py", "--help"]])
def test_help_loads_no_heavy_library(command):
    heavy = [
        "torchio",
        "wandb",
        "tensorboard",
        "mlflow",
        "monai",
        "nibabel",
        "SimpleITK",
        "imageio",
        "lightning",
    ]
    spy = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"loaded = [m for m in {heavy} if m in sys.modules]\n"
        "assert not loaded, loaded"
    )
    run = subprocess.run(
        [sys.executable, "-c", spy, *command], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "--out_dir" in run.stdout

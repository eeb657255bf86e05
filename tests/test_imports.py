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

# A room imports from the rooms before it, never from those after it.
ORDER = ["loaders", "models", "losses", "tracking", "inference", "training", "stage2", "commands"]
SCRIPTS = ORDER.index("commands")  # scripts and commands stand side by side

# Third-party libraries and the only places that may import them.
ONE_PLACE = {
    "jsonargparse": {"vae3d/config.py"},
    "wandb": {"vae3d/tracking/tracker.py"},
    "imageio": {"vae3d/tracking/media.py"},
    "imageio_ffmpeg": {"vae3d/tracking/media.py"},
    "torchio": {"loaders/preprocess.py"},
    "nibabel": {"loaders/readers/nifti.py"},
    "SimpleITK": {"loaders/readers/dicom.py"},
    "pydicom": {"loaders/readers/dicom.py"},
    "tifffile": {"loaders/readers/tiff.py"},
    "blosc2": {"loaders/compressed.py"},
    "isal": {"loaders/readers/common.py"},
    "nilearn": {"loaders/demo.py"},
    "monai": {"vae3d/stage2/diffusion.py", "vae3d/losses/features.py"},
    "lightning": {"vae3d/training/lit.py"},
    "huggingface_hub": {"vae3d/models/hub.py"},
}


def imports(path: Path):
    """Yield (module, line) of every import in a file, also those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield node.module, node.lineno


def room(dotted: str) -> int:
    """Position of a module in ORDER; scripts, the command line and the configuration come last."""
    parts = dotted.split(".")
    if parts[0] == "loaders" or dotted == "vae3d":  # the front door: __version__
        return 0
    if parts[0] == "vae3d" and len(parts) > 1 and parts[1] in ORDER:
        return ORDER.index(parts[1])
    return SCRIPTS


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    dotted = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    here = room(dotted)
    if dotted == "vae3d.__init__":
        pytest.skip("the front door names every room, lazily")
    for module, line in imports(path):
        if module.split(".")[0] not in ("vae3d", "loaders", "train_3d", "evaluate"):
            continue
        if module.startswith("vae3d.config") and here == ORDER.index("training"):
            continue  # the run folder's config.yaml is written by the room that writes the folder
        assert room(module) <= here, f"{path.name}:{line} imports {module}, a room after its own"
        if here == ORDER.index("models"):
            assert module.startswith("vae3d.models"), f"models import only models, not {module}"


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
    heavy = ["torchio", "wandb", "monai", "nibabel", "SimpleITK", "imageio", "lightning"]
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

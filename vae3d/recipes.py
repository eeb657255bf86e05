"""The recipes of `configs/`, found by name from any folder: they travel inside the package."""

from __future__ import annotations

from pathlib import Path

MAX_BYTES = 4 * 10**6  # of a recipe, which is read whole
HERE = Path(__file__).resolve().parent
HOME = next(p for p in (HERE / "configs", HERE.parent / "configs") if p.is_dir())


def find_recipe(kind: str, name: str) -> str:
    """Return the path of a recipe; the path of a file is its own.

    Args:
        kind: Folder of `configs/`: train | model | ldm.
        name: A file, or a recipe's name without `.yaml`.

    Raises:
        ValueError: Neither a file nor a recipe.

    Example:
        >>> Path(find_recipe("train", "demo")).name
        'demo.yaml'
    """
    if Path(name).is_file():
        if Path(name).stat().st_size > MAX_BYTES:
            raise ValueError(f"{name}: larger than {MAX_BYTES} bytes, which no recipe is")
        return name
    recipe = HOME / kind / f"{name}.yaml"
    if recipe.is_file():
        return str(recipe)
    known = ", ".join(sorted(path.stem for path in (HOME / kind).glob("*.yaml")))
    raise ValueError(f"{name}: no such file, and no recipe of that name; recipes are {known}")

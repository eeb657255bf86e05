"""Checkpoints that survive kill -9, a full disk and flipped bits.

A checkpoint is one file that `torch.load(weights_only=True)` reads: tensors, numbers, strings and
plain containers. It is written under a temporary name in the same folder, flushed to the disk and
renamed, so a name always stands for a whole file. The zip container's own checksums are verified
before loading, because `torch.load` alone returns flipped bits without a word.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loaders import DataConfig
from loaders.readers import Reading
from loaders.texts import Record, misfit, read_json
from loaders.whole import sweep, whole_file, write_text
from vae3d.models.classes import made
from vae3d.ranges import check_ranges
from vae3d.weights.hub import (
    RECIPE,
    WEIGHTS,
    check_archive,
    from_hub,
    load_strictly,
    read_state,
    recipe_of,
)

if TYPE_CHECKING:
    from vae3d.models.custom_vae import Contract, CustomVAE

FORMAT = 1
STEP_FILE = re.compile(r"step_(\d+)\.pt")
NAMES = ("last.pt", "best.pt")  # that step files bear beside their own
NOTE = "newest.json"  # a small file, and what is in it
NOTED = {"best": float, "stale": int, "owed": [str], "names": [str]}
WEIGHTS_OF = {str: torch.Tensor}
# What commands read of a checkpoint; see `loaders.texts.misfit`.
STATE = {
    "step": int,
    "spec": {"class_path": str, "init_args": {}},
    "model": WEIGHTS_OF,
    "ema": (WEIGHTS_OF, None),
    "preprocess": ({}, None),
    "config": {},
    "split": ({str: [str]}, None),
    "names": [str],
    "written": [str],
    "owed": [str],
    "mark": str,
    "best": float,
}
CONFIG = {
    "data": {
        "root": str,
        "cache_dir": (str, None),
        "on_error": str,
        "slice_axis": int,
        "num_slices": int,
    },
    "patch_size": ([int], None),
}
# How files are read, of data.*: part of what a network wants of its volumes, whichever they are.
READING = (*(name for name in Reading.names() if name != "region"), "slice_axis", "num_slices")


class Checkpoints:
    """The checkpoints of one run: `last.pt`, `best.pt` and the newest few `step_XXXXXXXX.pt`.

    A step is saved first and validated then. What validation finds is noted in a small file beside
    the checkpoints, so that none has to be written twice.

    Args:
        folder: Where they lie; made when it is missing.
        keep: How many step files stay, at least 2: the newest can be lost with the disk's sector.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        if keep < 2:
            raise ValueError(f"--keep_checkpoints must be at least 2, not {keep}")
        self.folder = Path(folder)
        self.keep = keep
        self.written: list[str] = []  # step files of this run, oldest first; survives a resume
        self.resumed_from: str | None = None
        self.newest: tuple[Path, dict[str, Any]] | None = None  # found, read, not yet resumed
        self.subject = (self.folder / "last.pt", "")  # checkpoint that notes are of, and its mark

    def sweep(self) -> None:
        """Remove temporaries that killed runs have left. Only for who holds the run's lock."""
        sweep(self.folder)

    def save(self, state: dict[str, Any]) -> Path:
        """Write `state` as the step's file, name it `last.pt`, then rotate.

        The names share one file on the disk where the file system has hard links.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step_{state['step']:08d}.pt"
        self.written = [name for name in self.written if name != path.name] + [path.name]
        mark = secrets.token_hex(8)
        write_atomic(path, {"format": FORMAT, **state, "written": self.written, "mark": mark})
        self.subject = path, mark
        self.name(path, ["last.pt"])
        old = [name for name in self.written[: -self.keep] if name != self.resumed_from]
        for name in old:
            (self.folder / name).unlink(missing_ok=True)
        self.written = [name for name in self.written if name not in old]
        return path

    def note(self, found: dict[str, object], best: bool = False) -> None:
        """Note what is known of the newest checkpoint since it was written; name the best.

        Args:
            found: Parts of its state that `resume` shall find instead of those in the file.
            best: Whether it is `best.pt` from now on.
        """
        path, mark = self.subject
        names = ["last.pt", *["best.pt"] * best]
        write_text(self.folder / NOTE, json.dumps({**found, "names": names, "mark": mark}) + "\n")
        self.name(path, ["best.pt"] * best)

    def find_latest(self) -> tuple[Path | None, list[str]]:
        """Return the valid file with the highest step, and why others were passed over.

        Raises:
            ValueError: There are files, and none of them is valid.
        """
        steps = {int(m[1]): p for p in self._files() if (m := STEP_FILE.fullmatch(p.name))}
        candidates = [steps[n] for n in sorted(steps, reverse=True)]
        last = self.folder / "last.pt"
        if last.exists() and not any(last.samefile(path) for path in candidates):
            candidates.append(last)
        skipped = []
        self.newest = None
        for path in candidates:
            if self.newest and path != last:
                continue  # an older step
            try:
                state = load_checkpoint(path)
            except ValueError as error:
                skipped.append(str(error))
                continue
            if not self.newest or state["step"] > self.newest[1]["step"]:
                self.newest = path, state
        if not self.newest and skipped:
            raise ValueError(
                f"{self.folder}: no checkpoint is readable ({'; '.join(skipped)}); "
                "restore one, or begin anew with --fresh"
            )
        return (self.newest[0] if self.newest else None), skipped

    def resume(self, path: Path) -> dict[str, Any]:
        """Take the state in `path` to go on from; it is never rotated away by this process."""
        found, self.newest = self.newest, None
        state = found[1] if found and found[0] == path else load_checkpoint(path)
        # Names of ours alone: what a damaged file tells is neither removed nor written.
        written = [name for name in state["written"] if STEP_FILE.fullmatch(name)]
        self.written = [name for name in written if (self.folder / name).exists()]
        self.resumed_from = path.name
        self.subject = path, state["mark"]
        state |= self._noted(state["mark"])
        return state | {"names": [name for name in state["names"] if name in NAMES]}

    def _noted(self, mark: str) -> dict[str, object]:
        """The note on the checkpoint with this mark; {} where there is none, or one on another."""
        try:
            note = read_json(self.folder / NOTE)
        except (OSError, ValueError):  # missing, or torn by the disk: the step is validated again
            return {}
        noted = isinstance(note, dict) and not misfit(
            note, {"mark": str} | {k: kind for k, kind in NOTED.items() if k in note}
        )
        return note if noted and note["mark"] == mark else {}

    def name(self, path: Path, names: Iterable[str]) -> None:
        """Let these names stand for `path`; a kill may have come between the file and its names."""
        for name in names:
            target = self.folder / name
            if not (target.exists() and target.samefile(path)):
                _link_atomic(path, target)

    def clear(self) -> None:
        """Forget the run: remove its checkpoints. What --fresh asks for."""
        for path in [*self._files(), self.folder / NOTE]:
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        found = self.folder.glob("*.pt") if self.folder.is_dir() else ()
        return [p for p in found if p.name in NAMES or STEP_FILE.fullmatch(p.name)]


def write_atomic(path: Path, state: dict[str, Any]) -> None:
    """Write `state` so that `path` is, at any moment, the old whole file or the new one."""
    try:
        with whole_file(path, durable=True) as temporary, open(temporary, "xb") as file:
            torch.save(state, file)
    except BaseException as error:
        # torch hides a full disk behind "unexpected pos"; the real reason is further down the chain
        reason = _os_error(error)
        if reason is None or reason.errno is None or reason.filename:
            raise
        raise OSError(reason.errno, os.strerror(reason.errno), str(path)) from error


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, or what stands for one, onto the CPU: see `find_checkpoint`.

    Returns:
        At least format, step, spec, model, ema, preprocess, config and split.

    Raises:
        ValueError: Missing, damaged, or not a checkpoint of this program.
    """
    path = find_checkpoint(path)
    if path.suffix == ".safetensors":
        return _of_weights(path)
    try:
        check_archive(path)
    except ValueError as error:
        raise ValueError(f"{path}: not a whole checkpoint: {error}") from error
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # RuntimeError, UnpicklingError, KeyError ...: torch has no one type
        raise ValueError(f"{path}: not a checkpoint of vae3d, there is code in it") from error
    if not isinstance(state, dict) or not {"format", "step", "model"} <= set(state):
        raise _weights_alone(state, path)
    state = _upgrade(state, path)
    _require(state, {name: kind for name, kind in STATE.items() if name in state}, path)
    return state


def find_checkpoint(path: str | Path) -> Path:
    """Find the file that `path` stands for.

    Args:
        path: A file; a run folder (its `best.pt`, else its `last.pt`); a folder that
            `save_pretrained` wrote; `owner/name` or `hf://owner/name` of the Hugging Face Hub.
    """
    address, path = str(path), Path(path)
    if path.is_file():
        return path
    for name in ("checkpoints/best.pt", "checkpoints/last.pt", "best.pt", "last.pt", WEIGHTS):
        if (path / name).is_file():
            return path / name
    if path.is_dir():
        raise ValueError(
            f"{path}: holds no checkpoints/best.pt or last.pt; is it a run folder? (one of another"
            " library is read by vae3d convert)"
        )
    # A name that begins like a folder that is here is a slip, not a repository.
    if address.startswith("hf://") or (address.count("/") == 1 and not path.parent.is_dir()):
        return from_hub(address)
    raise ValueError(f"{path}: no such checkpoint or run folder")


def load_model(path: str | Path, ema: bool = True, trust: Iterable[str] = ()) -> torch.nn.Module:
    """Rebuild a trained network in eval mode on the CPU.

    Args:
        path: Run folder, checkpoint file, folder that `save_pretrained` wrote, or repository of the
            Hugging Face Hub.
        ema: Take the averaged weights where the run kept some.
        trust: Module prefixes besides `vae3d` whose classes may be imported.

    Example:
        >>> vae = load_model("runs/a")  # doctest: +SKIP
    """
    return model_of(load_checkpoint(path), path, ema, trust)


def model_of(
    state: Record, path: str | Path, ema: bool = True, trust: Iterable[str] = ()
) -> torch.nn.Module:
    """Rebuild the network of a checkpoint that was read from `path`; see `load_model`."""
    from vae3d.models.custom_vae import CustomVAE
    from vae3d.models.spec import build

    _require(state, {name: STATE[name] for name in ("spec", "model")}, path)
    check_ranges("checkpoint", {"spec": state["spec"]}, f"{path}: its ")
    model = made(f"the network of {path}", lambda: build(state["spec"], trust=tuple(trust)))
    weights = state["ema"] if ema and state.get("ema") else state["model"]
    load_strictly(model, weights, f"the weights in {path}")
    if isinstance(model, CustomVAE):
        model.contract = contract_of(state)
    return model.eval()


def load_vae(path: str | Path, ema: bool = True, trust: Iterable[str] = ()) -> CustomVAE:
    """`load_model`, where nothing but a VAE will do."""
    return vae_of(load_checkpoint(path), path, ema, trust)


def vae_of(
    state: Record, path: str | Path, ema: bool = True, trust: Iterable[str] = ()
) -> CustomVAE:
    """`model_of`, where nothing but a VAE will do."""
    from vae3d.models.custom_vae import CustomVAE

    model = model_of(state, path, ema, trust)
    if not isinstance(model, CustomVAE):
        raise ValueError(f"{path}: holds a {type(model).__name__}, not a VAE; give the VAE's run")
    needed = ("step", "spec", "model", "ema", "preprocess", "split")
    _require(state, {name: STATE[name] for name in needed} | {"config": CONFIG}, path)
    return model


def contract_of(state: dict[str, Any]) -> Contract:
    """What the network of a checkpoint wants of its volumes, and where it comes from."""
    if "contract" in state:
        return state["contract"]
    config, split = state.get("config") or {}, state.get("split") or {}
    contract: Contract = {
        "preprocess": state.get("preprocess"),
        "data": {k: v for k, v in config.get("data", {}).items() if k in READING},
        "patch_size": config.get("patch_size"),
        "step": state["step"],
        "subjects": len(split.get("train", ())),
    }
    if state.get("best", math.inf) < math.inf:
        contract["measured"] = {"best val/mae": state["best"]}
    return contract


def preprocess_of(path: Path) -> dict[str, object] | None:
    """How a file's weights want their volumes prepared; None where it does not tell."""
    told = (_recipe(path)[1] or {}) if _has_recipe(path) else read_state(path)
    return told.get("preprocess")


def checkpoint_of(
    spec: dict[str, object], weights: dict[str, torch.Tensor], contract: Contract
) -> dict[str, object]:
    """What a training run would have saved, without subjects and optimizers.

    Args:
        spec: The network's recipe.
        weights: Its state dict.
        contract: What it wants of its volumes; what is missing is the default.
    """
    data = asdict(DataConfig())
    kept = {k: data[k] for k in ("root", "cache_dir", "on_error", *READING)}
    given = {k: v for k, v in contract.get("data", {}).items() if k in READING}
    return {
        "format": FORMAT,
        "step": contract.get("step", 0),
        "spec": spec,
        "model": weights,
        "ema": None,
        "preprocess": contract.get("preprocess"),
        "config": {
            "data": kept | given,
            "patch_size": contract.get("patch_size"),
        },
        "split": {"train": [], "val": [], "test": []},
        "contract": contract,
        "versions": versions(),
    }


def fingerprint(path: str | Path) -> str:
    """SHA-256 of a checkpoint's file, with that of the recipe beside it where there is one."""
    path = find_checkpoint(path)
    digest = hashlib.sha256(path.read_bytes())
    if _has_recipe(path):
        digest.update((path.parent / RECIPE).read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """What a checkpoint was written with."""
    from vae3d import __version__

    return {
        "vae3d": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def _has_recipe(path: Path) -> bool:
    return path.name == WEIGHTS and (path.parent / RECIPE).is_file()


def _of_weights(path: Path) -> dict[str, object]:
    """Read the weights and the recipe that `save_pretrained` wrote."""
    if not _has_recipe(path):
        raise _weights_alone(read_state(path), path)
    spec, contract = _recipe(path)
    return checkpoint_of(spec, read_state(path), contract or {})


def _recipe(path: Path) -> tuple[dict[str, object], Contract | None]:
    """Read the recipe and the contract beside a file of weights."""
    recipe = read_json(path.parent / RECIPE)
    if not isinstance(recipe, dict) or not {"class_path", "init_args"} <= set(recipe):
        raise ValueError(f"{path.parent / RECIPE}: no recipe of a network of vae3d")
    return recipe_of(recipe)


def _weights_alone(state: object, path: Path) -> ValueError:
    """The error about a file that is no checkpoint: what it holds, and the command that helps."""
    from vae3d.weights.convert import OURS, clean, without_recipe

    try:
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        weights, report = clean(state, (), None, path)
    except ValueError as error:
        return ValueError(
            f"{path}: not a checkpoint of vae3d: {str(error).removeprefix(f'{path}: ')}"
        )
    if report.layout == OURS:
        return ValueError(without_recipe(path, len(weights)))
    return ValueError(
        f"{path}: not a checkpoint of vae3d but {len(weights)} weights of {report.layout}; make one"
        f" of them: vae3d convert {path} vae.pt"
    )


def _upgrade(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Bring a checkpoint of an older format up to date: add here what later formats add."""
    if not isinstance(state["format"], int) or state["format"] > FORMAT:
        raise ValueError(
            f"{path}: format {state['format']} is newer than this program reads ({FORMAT}); "
            "update vae3d"
        )
    defaults = {"names": ["last.pt"], "mark": "", "owed": [], "written": [], "best": math.inf}
    return defaults | {"rewarm": None} | state


def _require(state: object, shape: object, path: Path | str) -> None:
    """Refuse a checkpoint that lacks what a command reads of it, or holds another kind of thing."""
    if found := misfit(state, shape):
        raise ValueError(f"{path}: damaged, or not of vae3d: its {found} is none that could be")


def _link_atomic(source: Path, target: Path) -> None:
    """Give `source` a second name, replacing what bore it; a copy where links are not known."""
    with whole_file(target, durable=True) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error

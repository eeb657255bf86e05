"""`vae3d sample --checkpoint runs/a` or `vae3d sample --ldm runs/ldm`: new volumes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loaders import Preprocess
from loaders.whole import write_text
from vae3d.commands.compare import Comparison
from vae3d.commands.compare import compare as judge
from vae3d.ranges import check_ranges

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vae3d.inference.reconstruct import Coding
    from vae3d.models.custom_vae import CustomVAE
    from vae3d.stage2.control import Controls
    from vae3d.stage2.latents import LatentStore
    from vae3d.stage2.prior import Kind
    from vae3d.stage2.task import Guidance

    Drawn = tuple[torch.Tensor, dict]  # a latent, and what to note down about it
    Shown = tuple[np.ndarray, dict]  # a picture, and the same


def sample(
    checkpoint: str | None = None,
    ldm: str | None = None,
    out_dir: str = "samples",
    n: int = 8,
    latents: str | None = None,
    prior: Literal["gaussian", "joint", "standard", "all"] = "all",
    label: str | None = None,
    condition: str | None = None,
    control: str | None = None,
    control_scale: float = 1.0,
    guidance: float = 1.0,
    solver: Literal["ddim", "ddpm", "euler", "heun"] | None = None,
    steps: int = 50,
    grid: tuple[int, ...] | None = None,
    mode: Literal["auto", "full", "patch", "exact"] | None = None,
    patch_size: tuple[int, ...] | None = None,
    overlap: int | float | None = None,
    blend: Literal["hann", "gaussian", "average", "crop"] | None = None,
    memory_gb: float | None = None,
    amp: Literal["off", "bf16", "fp16"] = "off",
    clip: bool = False,
    recon_format: Literal["ome-zarr", "nifti", "tiff"] | None = None,
    seed: int = 0,
    ema: bool = True,
    media: bool = True,
    compare: Comparison | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    trust: tuple[str, ...] = (),
) -> None:
    """Draw new volumes, from Gaussians over latent space or from a diffusion model.

        vae3d sample --checkpoint runs/a --n 8
        vae3d sample --ldm runs/ldm --n 8 --label F --guidance 2
        vae3d sample --ldm runs/by_mask --control mask.nii.gz
        torchrun --nproc_per_node=4 --no_python -- vae3d sample --ldm runs/ldm --n 8

    Writes to `out_dir`, for each source of latents, `<source>/sample_000.nii.gz` (`.ome.zarr`,
    `.ome.tif` or `.png` where the training volumes were such) and `.gif`; over all of them
    sheet.png and samples.json (seeds, settings, seconds). Intensities and voxel grid are those of
    one training volume, named in samples.json. Sample i depends on seed and i alone, not on n;
    under torchrun ranks share the samples out (its `--` keeps it from taking --n for an option of
    its own).

    Args:
        checkpoint: Run folder, checkpoint or folder of save_pretrained of the VAE, or
            hf://owner/name; null for the one that the ldm was trained with.
        ldm: Run folder or checkpoint of `vae3d train-ldm`; null for Gaussians.
        out_dir: Where the samples go.
        n: Samples of each source.
        latents: Folder of latents that the Gaussians are fitted to; null for `latents` in the run
            folder, which is written when it is missing.
        prior: gaussian (per channel) | joint (with the covariance of all latent values) | standard
            (N(0, 1), for comparison) | all. Without an ldm.
        label: Class to draw; null for no class in particular.
        condition: Folder of latents that the ldm attends to; sample i takes subject i, and round
            again.
        control: Volume or label map that the ldm's ControlNet sees, or a folder of some; sample i
            takes number i, and round again, and lies on its grid. Null for the ldm without it.
        control_scale: Factor of all that the ControlNet adds; 0 for nothing.
        guidance: Classifier-free guidance; 1 for none, above 1 follows label and condition more.
        solver: ddim | ddpm for a ddpm model, euler | heun for a flow; null for the first.
        steps: Steps of the solver.
        grid: Latent voxels per axis; null for the grid of a training latent.
        mode: How latents are decoded: full | patch (tiles, blended) | exact (bounded memory) | auto
            (full where it fits in memory, else exact); null for patch where they were encoded in
            patches or its options are given, else auto.
        patch_size: Tile in voxels for mode patch; null for the patch of encoding.
        overlap: Overlap of neighboring tiles: below 1 a fraction of the tile, else [voxels]; null
            as encoded.
        blend: How overlapping tiles are mixed; null as encoded.
        memory_gb: Memory budget of modes exact and auto on the device [GiB]; null for half of what
            is free.
        amp: off | bf16 | fp16, precision of convolutions and matrix products.
        clip: Clip intensities to the window, as those that the VAE was trained on are.
        recon_format: ome-zarr | nifti | tiff, what volumes are written as; null for what came in.
        seed: Seed of the samples.
        ema: Use the averaged weights of the ldm where the run kept some.
        media: Write GIFs and the contact sheet.
        compare: Judge the samples by `vae3d compare` when all are drawn, into
            `out_dir/comparison/<source>`; takes one process.
        device: auto | cpu | cuda | mps.
        trust: Module prefixes besides vae3d whose classes the checkpoints may import.
    """
    from vae3d.commands.decode import encoder_of
    from vae3d.inference.estimate import seconds, spell, told
    from vae3d.inference.reconstruct import coding_of
    from vae3d.kernels.precision import autocast
    from vae3d.kernels.progress import part, watched
    from vae3d.stage2.latents import check_header
    from vae3d.tracking.console import Gauge
    from vae3d.training.checkpoint import load_checkpoint
    from vae3d.training.distributed import open_world
    from vae3d.training.memory import SMALLER_PASSES, telling_of_device

    options = dict(n=n, seed=seed, steps=steps, guidance=guidance, control_scale=control_scale)
    check_ranges("sample", options)
    if compare is not None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("--compare takes one process: sample first, then run vae3d compare")
        compare.check(n)
    vae_path, fitted = checkpoint or "", latents or ""
    if ldm is None:
        if not vae_path:
            raise ValueError("give --checkpoint (a VAE) or --ldm (a diffusion model)")
        if label or condition or control:
            raise ValueError(
                "--label, --condition and --control need --ldm: Gaussians know none of them"
            )
        fitted = fitted or fitted_latents(vae_path, device, trust)
    sources: Mapping[str, FromGaussian | FromDiffusion]
    kinds: tuple[Kind, ...]
    with open_world(device) as world, telling_of_device(*SMALLER_PASSES):
        if ldm is not None:
            how = dict(solver=solver, steps=steps, guidance=guidance)
            diffusion = FromDiffusion(ldm, ema, trust, label, condition, **how)
            sources = {"ldm": diffusion}
            vae_path = vae_path or diffusion.vae
        else:
            kinds = ("gaussian", "standard") if grid else ("joint", "gaussian", "standard")
            sources = from_gaussians(fitted, kinds if prior == "all" else (prior,))
        template = next(iter(sources.values())).template
        check_header(template, fitted or str(ldm))
        axes = len(template["shape"]) - 1
        if grid and len(grid) != axes:
            raise ValueError(f"--grid {list(grid)}: give {axes} numbers of latent voxels")
        if grid and control:
            raise ValueError("--grid does not go with --control: a sample lies on its control")
        state = load_checkpoint(vae_path)
        vae = encoder_of(state, vae_path, template["made_by"], trust).to(world.device)
        patching = dict(patch_size=patch_size, overlap=overlap, blend=blend)
        made_by = template["made_by"]
        coding, lines = coding_of(made_by, mode, patching, memory_gb=memory_gb, amp=amp)
        coding.check(vae)
        drawn = state["config"] if ldm is None else diffusion.config  # bodies as the run drew them
        radiological = drawn.get("radiological", False)
        window = window_of(template) if clip else None
        if control is not None:
            diffusion.see(control, control_scale, Preprocess.of_checkpoint(state["preprocess"]))
        out = Path(out_dir)
        writer = Writer(out, vae, media, radiological, window, recon_format)
        todo = [(name, k) for name in sources for k in range(world.rank, n, world.size)]
        headers = {key: sources[key[0]].header(key[1]) for key in todo}
        if grid:
            factor = coding.factor(vae, axes)
            headers = {key: on_grid(header, grid, factor) for key, header in headers.items()}
        sizes = {key: header["volume_shape"][1:] for key, header in headers.items()}
        codings = {key: coding.settled(vae, size, ("decode",)) for key, size in sizes.items()}
        drawing = 0.0  # of the time of a sample
        if todo and world.is_main:
            line = told(coding, vae, [*sizes.values()], ("decode",))
            if ldm is not None:
                shape, size = headers[todo[0]]["shape"], sizes[todo[0]]
                with autocast(world.device, amp):
                    each = seconds_to_draw(diffusion, shape, seed, world.device)
                drawing = each / (each + seconds(coding, vae, [size], ("decode",)))
                line += f"; drawing their latents takes about {spell(each * len(todo))} more"
            print(*lines, line, sep="\n", flush=True)
        done = {}
        with Gauge("sample", enabled=world.is_main) as gauge, watched(gauge.add):
            for name, number in todo:
                with part(1 / len(todo)):
                    begun, header = time.monotonic(), headers[name, number]
                    with part(drawing), autocast(world.device, amp if ldm else "off"):
                        z, facts = sources[name].draw(header["shape"], seed, number, world.device)
                    facts |= {"seed": seed, "seconds_latent": time.monotonic() - begun}
                    facts |= {"intensities_of": template["subject"]}
                    drawn_as = header, codings[name, number]
                    with part(1 - drawing):
                        done[name, number] = writer.write(name, number, z, facts, *drawn_as)
                if world.is_main:
                    writer.note(done)  # a signal may end the next one
        done = {key: value for of in world.gather(done) for key, value in of.items()}
        if world.is_main:
            writer.finish({key: done[key] for key in sorted(done)})
    if compare is None:
        if world.is_main:
            print(f"judge them: vae3d compare {out / next(iter(sources))} REAL "
                  "--heldout UNSEEN, or at once by --compare.real REAL")  # fmt: skip
        return
    for name in sources:
        print(f"\n{name}")
        judge(
            str(out / name), compare.real, compare.heldout, str(out / "comparison" / name),
            compare.network, vae_path, seed=seed, device=device, trust=trust,
        )  # fmt: skip


def seconds_to_draw(
    source: FromDiffusion, shape: Sequence[int], seed: int, device: torch.device
) -> float:
    """How long a latent takes to draw [s], by the second of the solver's steps."""
    import torch

    from vae3d.kernels.progress import watched

    class Enough(Exception):
        pass

    def watch(amount: float) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        steps.append((amount, time.monotonic()))
        if len(steps) > 2:
            raise Enough

    steps = [(1.0, time.monotonic())]
    with watched(watch), suppress(Enough):
        source.draw(shape, seed, 0, device)
    (_, before), (amount, after) = steps[-2:]
    return (after - before) / amount


def on_grid(header: dict, grid: Sequence[int], factor: Sequence[int]) -> dict:
    """The header of a latent with another grid, all else the same."""
    if list(grid) == list(header["shape"][1:]):
        return header
    spatial = [voxels * f for voxels, f in zip(grid, factor, strict=True)]
    return header | {
        "shape": [header["shape"][0], *grid],
        "volume_shape": [header["volume_shape"][0], *spatial],
    }


def window_of(template: dict) -> tuple[float, float]:
    """The normalized intensities between which samples are clipped.

    Args:
        template: Header of a training latent.
    """
    from vae3d.stage2.sheet import RANGES

    intensity = template.get("intensity", "unit")
    if intensity not in RANGES:
        raise ValueError(
            f"--clip: the VAE's intensities ({intensity}) have no window; leave it out"
        )
    return RANGES[intensity]


def fitted_latents(
    checkpoint: str, device: Literal["auto", "cpu", "cuda", "mps"], trust: tuple[str, ...]
) -> str:
    """Folder of the latents of a run's training subjects, encoded now when it is missing."""
    from vae3d.training.checkpoint import find_checkpoint, load_checkpoint

    path = find_checkpoint(checkpoint)
    run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    folder = run / "latents"
    if not (folder / "latents.json").is_file():
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError(
                f"{folder}: no latents yet; write them with vae3d encode, or --latents"
            )
        from vae3d.commands.encode import encode

        if not (load_checkpoint(path).get("split") or {}).get("train"):
            raise ValueError(
                f"{checkpoint}: knows no training volumes; write latents of some by vae3d encode"
                f" --checkpoint {checkpoint} --data.root DIR --out_dir latents, and give --latents"
            )
        print(f"encoding the training volumes into {folder}", flush=True)
        encode(str(path), str(folder), split="train", device=device, trust=trust)
    return str(folder)


def from_gaussians(latents: str, kinds: tuple[Kind, ...]) -> dict[str, FromGaussian]:
    """One source for each kind of Gaussian; where all are asked for, without one that cannot be."""
    from vae3d.stage2.latents import LatentStore, read_index

    parts = {info["split"] for info in read_index(latents)["subjects"].values()}
    store = LatentStore(latents, split="train" if "train" in parts else None)
    sources: dict[str, FromGaussian] = {}
    for kind in kinds:
        try:
            sources[kind] = FromGaussian(store, kind)
        except ValueError as error:
            if len(kinds) == 1:
                raise
            print(f"left out: {error}")
    return sources


class FromGaussian:
    """Latents from a Gaussian.

    Args:
        store: Training latents.
        kind: gaussian | joint | standard.
    """

    def __init__(self, store: LatentStore, kind: Kind):
        from vae3d.stage2.prior import GaussianPrior

        self.prior, self.template = GaussianPrior(store, kind), store.infos[0]

    def header(self, _number: int) -> dict:
        """What the file of latent number `number` would say of its grid."""
        return self.template

    def draw(self, shape: Sequence[int], seed: int, number: int, _device: torch.device) -> Drawn:
        """Latent number `number` and what to note down about it."""
        from vae3d.stage2.latents import keyed_generator

        return self.prior.draw(shape, keyed_generator(seed, number)), {}


class FromDiffusion:
    """Latents from a diffusion model.

    Args:
        path: Run folder or checkpoint of train-ldm.
        ema: Use averaged weights.
        trust: Module prefixes whose classes may be imported.
        label: Class, or None.
        condition: Folder of latents to attend to, or None.
        **solving: solver, steps and guidance of `LatentDiffusion.sample`.
    """

    def __init__(self, path: str, ema: bool, trust: Sequence[str], label: str | None,
                 condition: str | None, **solving: Any):  # fmt: skip
        import torch

        from vae3d.stage2.diffusion import LatentDiffusion
        from vae3d.stage2.latents import LatentStore
        from vae3d.training.checkpoint import load_checkpoint, model_of

        state = load_checkpoint(path)
        model = model_of(state, path, ema, trust)
        if not isinstance(model, LatentDiffusion):
            raise ValueError(f"{path}: not a run of vae3d train-ldm; a VAE goes to --checkpoint")
        self.path, self.model = path, model
        self.vae, self.template = state["latents"]["vae"], state["latents"]["template"]
        self.config = state["config"]
        self.solving, self.condition, self.label = solving, None, None
        self.controls: Controls | None = None
        if label is not None:
            self.label = torch.tensor([self.model.class_index(label)])
        if condition is not None:
            if self.model.condition_channels is None:
                raise ValueError(f"{path}: trained without --condition, so it cannot take one")
            self.condition = LatentStore(condition)

    def see(self, place: str, scale: float, preprocess: Preprocess) -> None:
        """Draw on the grids of controls from now on, as its ControlNet asks.

        Args:
            place: The controls.
            scale: Factor of all that the ControlNet adds.
            preprocess: That of the VAE.
        """
        from vae3d.stage2.control import controls_to_draw

        channels, labels = self.model.control_channels, self.model.control_labels
        if channels is None:
            raise ValueError(
                f"{self.path}: trained without --control, so it cannot take one; train one on top "
                f"of it: vae3d train-ldm latents --control DIR --base {self.path}"
            )
        self.controls = controls_to_draw(place, self.template, preprocess, labels, channels)
        self.solving["control_scale"] = scale

    def header(self, number: int) -> dict:
        """What the file of latent number `number` would say of its grid."""
        if self.controls is None:
            return self.template
        return self.controls.headers[number % len(self.controls)]

    def draw(self, shape: Sequence[int], seed: int, number: int, device: torch.device) -> Drawn:
        """Latent number `number` and what to note down about it."""
        import torch

        from vae3d.stage2.latents import keyed_generator

        facts = {k: v for k, v in self.solving.items() if v is not None}
        condition = control = None
        if self.condition is not None:
            subject = number % len(self.condition)
            facts["condition"] = self.condition.ids[subject]
            means = torch.from_numpy(self.condition.read(subject)).chunk(2)[0]
            condition = means[None].to(device)
        if self.controls is not None:
            seen = number % len(self.controls)
            facts["control"] = self.controls.ids[seen]
            control = self.controls.read(seen)[None].to(device)
        generator = keyed_generator(seed, number)
        noise = torch.randn(tuple(shape), generator=generator)[None].to(device)
        torch.manual_seed(generator.seed())  # the solver ddpm draws from the global generator
        label = None if self.label is None else self.label.to(device)
        guided: Guidance = {"label": label, "condition": condition, "control": control}
        z = self.model.to(device).sample(noise, **guided, **self.solving)
        return z[0].float().cpu(), facts


class Writer:
    """Decodes latents and writes volumes and pictures.

    Args:
        out_dir: Where to.
        vae: The model, in eval mode on its device.
        media: Whether to write pictures.
        radiological: Draw bodies with their right on the left.
        window: Intensities between which samples are clipped; None for all that come.
        form: Format of the volumes; None for that of the training latent.
    """

    def __init__(self, out_dir: Path, vae: CustomVAE, media: bool, radiological: bool,
                 window: tuple[float, float] | None = None, form: str | None = None):  # fmt: skip
        self.out_dir, self.vae, self.window, self.form = out_dir, vae, window, form
        self.media, self.radiological = media, radiological

    def write(self, name: str, number: int, z: torch.Tensor, facts: dict, header: dict,
              coding: Coding) -> Shown:  # fmt: skip
        """Decode a latent, write the volume and its GIF; return its picture and the facts.

        Args:
            name: Of its source.
            number: Of the sample.
            z: The latent `(C, *grid)`.
            facts: What is known of it; more is added.
            header: Gives grid and intensities.
            coding: How to decode.
        """
        from loaders.undo import write_undone
        from vae3d.stage2.sheet import scroll, three_slices, view_of
        from vae3d.tracking.media import write_gif

        begun = time.monotonic()
        size = header["volume_shape"][1:]
        x = coding.decode(self.vae, z, size, f"{name} {number}", self.out_dir).numpy()
        if self.window is not None:
            x.clip(*self.window, out=x)
        facts |= {"mode": coding.mode, "seconds_decode": time.monotonic() - begun}
        facts |= {"shape": list(x.shape)}
        folder, stem = self.out_dir / name, f"sample_{number:03d}"
        record = header["source"]["undo"]
        on_store_grid = record | {"geometry": {"source_affine": record["affine"]}}
        path = write_undone(folder, stem, x, on_store_grid, self.form)
        view = view_of(x, header, self.radiological)
        if self.media:
            frames = scroll(x, title=f"{name} {number}", **view)
            write_gif(folder / f"{stem}.gif", frames)
        seconds = facts["seconds_latent"] + facts["seconds_decode"]
        print(f"{path}  {seconds:.1f} s", flush=True)
        return three_slices(x, **view), facts

    def note(self, done: dict[tuple[str, int], Shown]) -> None:
        """Write samples.json, the facts of all samples."""
        facts = {f"{name}/sample_{n:03d}": facts for (name, n), (_, facts) in done.items()}
        write_text(self.out_dir / "samples.json", json.dumps(facts, indent=1) + "\n")

    def finish(self, done: dict[tuple[str, int], Shown]) -> None:
        """Write samples.json and the contact sheet over the samples of all ranks."""
        from vae3d.stage2.sheet import contact_sheet
        from vae3d.tracking.media import write_png

        self.note(done)
        rows: dict[str, list] = {}
        for (name, _), (picture, _) in done.items():
            rows.setdefault(name, []).append(picture)
        if self.media:
            print(write_png(self.out_dir / "sheet.png", contact_sheet(rows)))

"""`vae3d train-ldm latents --out_dir runs/ldm`: diffusion over latents.

The loop, checkpoints, resuming, averaging and tracking are those of the first stage.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vae3d.config import config_dict
from vae3d.models.classes import made
from vae3d.training.options import Loop, as_options, spread

if TYPE_CHECKING:
    from loaders.splits import Split
    from vae3d.stage2.control import Controls
    from vae3d.stage2.diffusion import LatentDiffusion
    from vae3d.stage2.latents import LatentStore
    from vae3d.stage2.task import Guide
    from vae3d.tracking.tracker import Tracker


PICTURE_STEPS = 25  # of the solver, half of those of `vae3d sample`
# Options that the network of --base brings with it.
OF_BASE = (
    *("unet", "process", "prediction", "noise_schedule", "time_sampling"),
    *("cross_attention_dim", "condition_dropout"),
)


@dataclass
class UNet:
    """MONAI's DiffusionModelUNet.

    Args:
        channels: Channels per level; each level halves the latent grid.
        num_res_blocks: Residual blocks of each level.
        attention_levels: Which levels attend, to themselves and to a condition.
        num_head_channels: Channels of an attention head, per level.
        norm_num_groups: Groups of the group norms; divides all channels.
        resblock_updown: Change size by residual blocks.
        transformer_num_layers: Transformer blocks of an attending level.
        upcast_attention: Attend in float32 under amp.
        use_flash_attention: Use torch's fused attention.
    """

    channels: tuple[int, ...] = (64, 128, 192)
    num_res_blocks: int = 2
    attention_levels: tuple[bool, ...] = (False, False, True)
    num_head_channels: tuple[int, ...] = (0, 0, 32)
    norm_num_groups: int = 32
    resblock_updown: bool = False
    transformer_num_layers: int = 1
    upcast_attention: bool = False
    use_flash_attention: bool = True


@dataclass(frozen=True, kw_only=True)
class LatentLoop(Loop):
    """The options of the loop as they suit latents, which are small and cheap."""

    max_steps: int = 20000
    lr: float = 1e-4
    warmup_steps: int = 200
    val_volumes: int = 16
    media_every: int = 2000
    media_volumes: int = 4


@spread
def train_ldm(
    latents: str,
    /,
    out_dir: str,
    unet: UNet | None = None,
    *,
    process: Literal["flow", "ddpm"] = "flow",
    prediction: Literal["epsilon", "v", "sample"] | None = None,
    noise_schedule: Literal["linear_beta", "scaled_linear_beta", "cosine"] = "scaled_linear_beta",
    time_sampling: Literal["uniform", "logit_normal"] = "uniform",
    label: str | None = None,
    condition: str | None = None,
    cross_attention_dim: int = 64,
    condition_dropout: float = 0.1,
    control: str | None = None,
    base: str | None = None,
    crop: tuple[int, ...] | None = None,
    batch_size: int = 4,
    vae: str | None = None,
    trust: tuple[str, ...] = (),
    loop: LatentLoop,
) -> int:
    """Train a diffusion model on latents that `vae3d encode` wrote.

        vae3d train-ldm latents --out_dir runs/ldm
        torchrun --nproc_per_node=2 --no_python -- vae3d train-ldm latents --out_dir runs/ldm
        vae3d train-ldm latents --control masks --base runs/ldm --out_dir runs/by_mask

    Trains on the run's training subjects, or on all where there was no split. The same command
    again resumes from the newest checkpoint.

    Args:
        latents: Folder of latents.
        out_dir: Run folder: config.yaml, metrics.jsonl, checkpoints/, media/, wandb/.
        unet: The network.
        process: flow (rectified flow) | ddpm.
        prediction: epsilon | v | sample; null for v with flow and epsilon with ddpm.
        noise_schedule: Noise schedule of ddpm.
        time_sampling: uniform | logit_normal (more often in the middle), for training times.
        label: Manifest column whose values become classes.
        condition: Folder of further latents of the same subjects, attended to by cross-attention.
        cross_attention_dim: Width of the condition's tokens.
        condition_dropout: Part of the samples trained without label and condition, for guidance.
        control: Folder, glob or manifest of volumes or label maps, one called as each subject,
            that a ControlNet sees. It alone is trained, on top of --base, which stays as it is.
        base: Run folder or checkpoint of train-ldm that --control is added to, not read again on
            resuming. Network, process and classes are its own.
        crop: Train on random crops of this size [latent voxels]; null for whole latents.
        batch_size: Latents in a micro-batch on each rank [latents].
        vae: Run folder or checkpoint of the VAE, for the pictures; null for the one that encoded.
        trust: Module prefixes besides vae3d whose classes the VAE may import.
        loop: Each option of the loop by its own name, see `vae3d.training.options`.

    Returns:
        Exit code: 0 done or out of time, 143 after SIGTERM, 130 after SIGINT, 138 after SIGUSR1.
    """
    call = as_options(locals())

    import torch

    from loaders import PatchLoader
    from vae3d.models.spec import build
    from vae3d.stage2.diffusion import LatentDiffusion
    from vae3d.stage2.latents import read_index
    from vae3d.stage2.task import Guide, LatentTask, LatentValidation
    from vae3d.training.distributed import open_world
    from vae3d.training.memory import telling_of_device
    from vae3d.training.run import Run
    from vae3d.training.trainer import Trainer

    with (
        open_world(loop.device, loop.timeout_minutes) as world,
        Run(out_dir, world, loop.keep_checkpoints) as run,
        telling_of_device("--batch_size", "--crop", "--unet.channels"),
    ):
        config, state = run.begin(train_ldm, call, loop.fresh, loop.force)
        loop = replace(loop, amp=run.precision(loop.amp, state))
        begun, say = state and state["split"], print if world.is_main else None
        parts = parts_of(latents, begun, loop.force, say)
        train, held_out, (given, held_out_given) = open_latents(latents, condition, parts)
        check_crop(crop, train, condition, control)
        seen, held_out_seen = open_controls(control, base, train, held_out)
        index = read_index(latents)

        torch.manual_seed(loop.seed)
        if seen is not None and state is not None:
            model = build(state["spec"])
        elif seen is not None:
            model = controlled(config, index, seen)
        else:
            network = partial(
                LatentDiffusion,
                latent_channels=train.shape(0)[0] // 2,
                spatial_dims=2 if len(train.shape(0)) == 3 else 3,
                unet=asdict(unet or UNet()),
                process=process,
                prediction=prediction,
                schedule=noise_schedule,
                time_sampling=time_sampling,
                classes=classes_of(train, label),
                condition_channels=given.shape(0)[0] // 2 if given else None,
                cross_attention_dim=cross_attention_dim,
                condition_dropout=condition_dropout,
            )
            model = made("--unet", network)
            model.set_statistics(train.statistics, given.statistics if given else None)
        model.to(world.device)
        task = LatentTask(model, train, label, given, seen, loop.seed)
        loader = PatchLoader(
            train,
            patch_size=crop,
            patching="random_parts" if crop else None,
            patches_per_volume=1,
            batch_size=batch_size,
            seed=loop.seed,
            rank=world.rank,
            world_size=world.size,
            threads=loop.threads,
            pin=world.device.type == "cuda",
        )
        validation = None
        if held_out:
            guide = Guide(model, held_out, label, held_out_given, held_out_seen)
            validation = LatentValidation(held_out, guide, world, loop.val_volumes)
        if vae is None and Path(index["vae"]).is_file():
            vae = index["vae"]
        pictures = None
        if loop.media_every and vae:
            folder = Path(out_dir) / "media"
            pictures = Pictures(
                vae, trust, train, task.guide, folder, loop.media_volumes, loop.radiological
            )
        tracker = run.track(loop, config, state)

        trainer = Trainer(
            task,
            loader,
            run.checkpoints,
            world,
            tracker,
            loop=loop,
            validate=validation,
            monitor="val/loss",
            show=partial(pictures, tracker=tracker) if pictures else None,
            sources=lambda batch: sorted({train.ids[i] for i in batch.volume.tolist()}),
            record={
                "spec": model.spec,
                "config": config,
                "split": {"train": train.ids, "val": held_out.ids if held_out else []},
                "preprocess": None,
                "latents": {
                    "vae": vae or index["vae"],
                    "made_by": index["made_by"],
                    "template": train.infos[0],
                },
            },
        )
        return run.fit(trainer, state)


def parts_of(
    latents: str, begun: Split | None, force: bool, say: Callable[[str], None] | None = print
) -> Split:
    """The subjects that train and validate: those that the run began with, where it goes on.

    Args:
        latents: Folder of latents.
        begun: What the run began with, or None.
        force: Go on although the latents have changed since.
        say: Takes the line on that; None for ranks that follow.
    """
    from loaders.splits import changes_since
    from vae3d.stage2.latents import find_latents, read_info

    infos = [read_info(path) for path in find_latents(latents)]
    part_of = {info["subject"]: info["split"] for info in infos}
    if "train" not in part_of.values():  # there was no split: all train
        part_of = dict.fromkeys(part_of, "train")
    used = ("train", "val")
    if begun is None:
        return {part: [name for name, of in part_of.items() if of == part] for part in used}
    known = {name for names in begun.values() for name in names}
    today = {name: part for name, part in part_of.items() if name in known or part in used}
    split, lines = changes_since(today, begun, force, latents)
    if say is not None:
        for line in lines:
            say(line)
    return split


def open_latents(
    latents: str, condition: str | None, parts: Split
) -> tuple[LatentStore, LatentStore | None, tuple[LatentStore | None, LatentStore | None]]:
    """Open training and validation latents, and the conditions of both.

    Args:
        latents: Folder of latents.
        condition: Folder of conditions, or None.
        parts: The subjects that train and validate.

    Returns:
        Training store, validation store or None, and their conditions (or Nones).
    """
    from vae3d.stage2.latents import LatentStore

    train = LatentStore(latents, parts["train"])
    held_out = LatentStore(latents, parts["val"]) if parts["val"] else None
    if condition is None:
        return train, held_out, (None, None)
    held_out_condition = LatentStore(condition, held_out.ids) if held_out else None
    return train, held_out, (LatentStore(condition, train.ids), held_out_condition)


def open_controls(
    control: str | None, base: str | None, train: LatentStore, held_out: LatentStore | None
) -> tuple[Controls | None, Controls | None]:
    """Open what a ControlNet sees of the subjects that train, and of those held out.

    Args:
        control: Folder, glob or manifest, or None.
        base: Run that it is added to, which has to be named with it.
        train: Training latents.
        held_out: Validation latents, or None.
    """
    if control is None or base is None:
        if control is not None:
            raise ValueError("--control is added to a trained model: give its run as --base")
        if base is not None:
            raise ValueError("--base is what --control is added to: give that too")
        return None, None
    from vae3d.stage2.control import Controls, find_controls, labels_in

    both = train.ids + (held_out.ids if held_out else [])
    store = find_controls(control, both)
    labels = labels_in(store)
    of_train = Controls(store.subset(train.ids), train.infos, labels)
    if not held_out:
        return of_train, None
    return of_train, Controls(store.subset(held_out.ids), held_out.infos, labels)


def controlled(config: dict, index: dict, seen: Controls) -> LatentDiffusion:
    """The model of --base with a ControlNet that adds nothing yet.

    Args:
        config: Options of `train_ldm`; those of the network are those of the base, or left out.
        index: Of the latents, which have to be of the base's VAE.
        seen: What the ControlNet sees.
    """
    from vae3d.models.spec import build
    from vae3d.stage2.diffusion import LatentDiffusion
    from vae3d.training.checkpoint import load_checkpoint, model_of

    path = config["base"]
    state = load_checkpoint(path)
    base = model_of(state, path)
    if not isinstance(base, LatentDiffusion):
        raise ValueError(f"--base {path}: not a run of vae3d train-ldm")
    if base.controlnet is not None:
        raise ValueError(f"--base {path}: has a control already; give the run that it was added to")
    if state["latents"]["made_by"]["checkpoint"] != index["made_by"]["checkpoint"]:
        raise ValueError(f"--base {path}: was trained on latents of another VAE than these")
    usual = config_dict(train_ldm, {name: config[name] for name in ("latents", "out_dir")})
    for name in OF_BASE:
        if config[name] not in (usual[name], state["config"][name]):
            raise ValueError(f"--{name}: the network is that of --base; leave it out")
    for name, has in (("label", base.classes), ("condition", base.condition_channels)):
        if bool(has) != bool(config[name]):
            do = "give it here too" if has else "leave it out"
            raise ValueError(f"--{name}: --base was trained {'with' if has else 'without'}; {do}")
    spec = base.spec
    spec["init_args"] |= {"control_channels": seen.channels, "control_labels": seen.labels}
    model: LatentDiffusion = build(spec)
    model.begin_with(base)
    kind = f"labels {', '.join(map(str, seen.labels))}" if seen.labels else "intensities"
    print(f"control: {kind}, {seen.channels} channel{'s' * (seen.channels > 1)}", flush=True)
    return model


def check_crop(
    crop: tuple[int, ...] | None, store: LatentStore, condition: str | None, control: str | None
) -> None:
    """Refuse crops that cannot be trained on."""
    if crop is None:
        return
    for name, place in (("condition", condition), ("control", control)):
        if place is not None:
            raise ValueError(f"--crop does not go with --{name}: positions must match; drop --crop")
    if len(crop) != len(store.shape(0)) - 1:
        raise ValueError(f"--crop {list(crop)}: latents have {len(store.shape(0)) - 1} axes")
    for i, name in enumerate(store.ids):
        size = list(store.shape(i)[1:])
        if any(c > n for c, n in zip(crop, size, strict=True)):
            raise ValueError(f"--crop {list(crop)} is larger than the latent of {name}, {size}")


def classes_of(store: LatentStore, label: str | None) -> tuple[str, ...]:
    """The values of a manifest column among the training subjects."""
    if label is None:
        return ()
    found = (store.labels(i).get(label) for i in range(len(store)))
    names = {name for name in found if name is not None}
    if not names:
        known = sorted({key for i in range(len(store)) for key in store.labels(i)})
        there = ", ".join(known) or "no labels"
        raise ValueError(f"--label {label}: no subject has it; the latents know {there}")
    if len(names) > 100:
        raise ValueError(f"--label {label} has {len(names)} values; classes must be few")
    return tuple(sorted(names))


class Pictures:
    """Draws the same few samples each time and decodes them.

    Args:
        vae: Run folder or checkpoint of the VAE.
        trust: Module prefixes whose classes it may import.
        store: Training latents; each sample is on the grid of one.
        guide: What the training subjects are guided by; each sample takes that of one.
        folder: Where pictures go.
        count: Samples in a picture.
        radiological: Draw bodies with their right on the left.
    """

    def __init__(
        self,
        vae: str,
        trust: tuple[str, ...],
        store: LatentStore,
        guide: Guide,
        folder: Path,
        count: int,
        radiological: bool = False,
    ):
        from vae3d.commands.decode import load_encoder
        from vae3d.inference.reconstruct import coding_of
        from vae3d.stage2.latents import check_header

        self.templates = store.infos[:count]
        for template, path in zip(self.templates, store.paths, strict=False):
            check_header(template, path)
        made_by = store.infos[0]["made_by"]
        self.coding, _ = coding_of(made_by, "full")
        self.vae = load_encoder(vae, made_by, trust)  # now: another model must not fail hours later
        self.guide, self.folder, self.radiological = guide, folder, radiological

    def __call__(self, network: LatentDiffusion, step: int, tracker: Tracker | None) -> None:
        """Write `samples_<step>.png` and show it. Only the rank with a tracker does it."""
        if tracker is None:
            return
        import torch

        from vae3d.stage2.latents import keyed_generator
        from vae3d.stage2.sheet import three_slices, view_of

        device = network.latent_mean.device
        vae = self.vae.to(device)
        pictures = []
        for number, template in enumerate(self.templates):
            noise = torch.randn(template["shape"], generator=keyed_generator(0, number))
            guidance = self.guide(torch.tensor([number]), device)
            z = network.sample(noise[None].to(device), PICTURE_STEPS, **guidance)
            x = self.coding.decode(vae, z[0].cpu(), template["volume_shape"][1:]).numpy()
            pictures.append(three_slices(x, **view_of(x, template, self.radiological)))
        self.vae.to("cpu")
        path = self.folder / f"samples_{step:08d}.png"
        rows = {f"samples at step {step}": pictures}
        tracker.in_background(write_sheet, path, rows, step=step)


def write_sheet(path: Path, rows: dict[str, list]) -> dict[str, Path]:
    """Write a contact sheet; return it by the name of its panel."""
    from vae3d.stage2.sheet import contact_sheet
    from vae3d.tracking.media import write_png

    path.parent.mkdir(parents=True, exist_ok=True)
    return {"samples": write_png(path, contact_sheet(rows))}

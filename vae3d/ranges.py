"""What numbers an option may be: one table over all commands, and all classes they build.

An option means the same wherever it stands, so it is found by its name; where two of one name
differ, by its owner's name before it. Limits at the high end only tell a slip from a wish: what
lies beyond them would fill the memory before it was refused.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

MANY = 10**6  # a limit that only a slip exceeds, and that is told to no other
MOST = sys.float_info.max


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included unless they are `open`."""

    low: float = -MOST
    high: float = MOST
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether an option may be this number; NaN is none."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if self.low == -MOST:
            return "give a finite number"
        low = f"more than {self.low:g}" if self.open_low else f"{self.low:g}"
        if self.high >= MANY:
            return f"give {low}" if self.open_low else f"give {low} or more"
        return f"give {low} to {'below ' * self.open_high}{self.high:g}"


ANY = Range(-math.inf, math.inf)
FINITE, POSITIVE, NOT_NEGATIVE = Range(), Range(0, open_low=True), Range(0)
PART, BELOW_ONE = Range(0, 1), Range(0, 1, open_high=True)
COUNT, WIDTH, SIDE = Range(1, 10**9), Range(1, 2**16), Range(1, 2**16)
STEPS, SEED, LAYERS = Range(0, 10**12), Range(0, 2**63 - 1), Range(0, 1000)

RANGES = {
    # the loop
    **dict.fromkeys(("max_steps", "log_every", "early_stop", "max_bad_steps"), Range(1, 10**12)),
    **dict.fromkeys(("val_every", "media_every", "save_every", "warmup_steps"), STEPS),
    **dict.fromkeys(("start_step", "val_volumes", "media_volumes", "rewarm_steps"), STEPS),
    **dict.fromkeys(("lr", "discriminator_lr", "weight_decay"), Range(0, 1e6)),
    **dict.fromkeys(("betas", "ema_decay"), BELOW_ONE),
    **dict.fromkeys(("clip_norm", "max_hours"), NOT_NEGATIVE),
    "grad_accum": Range(1, 10**6),
    "keep_checkpoints": Range(2, 10**6),
    "seed": SEED,
    "threads": Range(0, 1024),
    "timeout_minutes": Range(0, 10**6, open_low=True),
    **dict.fromkeys(("Mesh.data", "Mesh.spatial"), Range(1, 2**16)),
    # volumes and patches
    **dict.fromkeys(("patch_size", "crop", "grid", "resolution", "attn_resolutions"), SIDE),
    **dict.fromkeys(("batch_size", "n", "patches_per_volume"), Range(1, 10**6)),
    "patches_per_read": Range(1, 10**6),
    **dict.fromkeys(("limit", "volumes", "num_subjects"), COUNT),
    **dict.fromkeys(("fractions", "probability", "condition_dropout"), PART),
    **dict.fromkeys(("crop_margin_mm", "tolerance_mm", "overlap"), NOT_NEGATIVE),
    "control_scale": Range(0, 1e6),
    **dict.fromkeys(("window_hu", "data_range", "latent_shift", "mean", "logvar_init"), FINITE),
    **dict.fromkeys(("weights", "mask_weights"), NOT_NEGATIVE),
    "percentiles": Range(0, 100),
    "spacing_mm": POSITIVE,
    "demo_data.spacing_mm": Range(0.25, 50),
    "pad_to_multiple": Range(1, 4096),
    "rules": Range(1, 2),
    "folds": Range(2, 10**6),
    "fold": Range(0, 10**6),
    "slice_axis": Range(0, 2),
    "num_slices": Range(1, 4096),
    "DataConfig.threads": Range(1, 1024),
    "DataConfig.channels": Range(0, 2**16),
    **dict.fromkeys(("level", "time_point"), Range(0, 10**6)),
    "region": Range(0, 10**9),
    "cache_gb": Range(0, 10**6),
    "spatial_dims": Range(2, 3),
    "memory_gb": Range(0.01, 10**6),  # less is not kept by the libraries alone
    "latent_bits": Range(1, 64),
    "lesions": Range(-(2**31), 2**31),
    # networks
    **dict.fromkeys(("in_channels", "out_channels", "channels", "latent_channels"), WIDTH),
    **dict.fromkeys(("z_channels", "stem_channels", "base_ch", "ch_mult", "embed_dim"), WIDTH),
    **dict.fromkeys(("num_channels", "cross_attention_dim", "num_groups"), WIDTH),
    **dict.fromkeys(("norm_num_groups", "num_heads", "expansion", "kernel", "window"), WIDTH),
    **dict.fromkeys(("factors", "relative_position_bias"), SIDE),
    **dict.fromkeys(("num_res_blocks", "decoder_res_blocks", "transformer_num_layers"), LAYERS),
    **dict.fromkeys(("num_head_channels", "norm_groups"), Range(0, 2**16)),
    "num_layers": Range(1, 30),
    **dict.fromkeys(("eps", "norm_eps", "std", "min_std", "latent_scale"), POSITIVE),
    **dict.fromkeys(("dropout", "momentum"), PART),
    **dict.fromkeys(("min_logvar", "max_logvar", "init_logvar"), Range(-80, 80)),
    "levels": Range(3, 2**20),
    "codebook": Range(2, 2**20),
    **dict.fromkeys(("VQ.ema", "reseed"), BELOW_ONE),
    # losses
    **dict.fromkeys(("weight", "free_bits", "target_rate", "alpha", "max_adaptive"), NOT_NEGATIVE),
    **dict.fromkeys(("feature_matching_weight", "r1_weight"), NOT_NEGATIVE),
    **dict.fromkeys(("sigma", "target_std", "SSIM.data_range"), POSITIVE),
    "r1_every": COUNT,
    "delta": Range(-16, 16),
    "bins": Range(2, 4096),
    "shrink": Range(1, 64),
    "strength": NOT_NEGATIVE,
    "smallest": WIDTH,
    # augmentation
    "flip": Range(0, 2),
    "rotation_deg": Range(0, 180),
    "scaling": BELOW_ONE,
    "noise": NOT_NEGATIVE,
    "power": Range(1, 2),
    # samples
    "steps": Range(1, 10**6),
    "guidance": Range(0, 10**6),
    "neighbors": Range(1, 10**6),
}


MAY_BE_EMPTY = ("attn_resolutions", "flip")


def check_ranges(owner: str, options: Mapping[str, object], before: str = "--") -> None:
    """Raise ValueError, by the name of the option, for a number that it cannot be.

    Args:
        owner: Function or class whose options they are.
        options: Values by name; groups of options and the classes of sockets are looked into.
        before: What stands before the names on a command line.
    """
    for name, value in options.items():
        allowed = RANGES.get(f"{owner}.{name}", RANGES.get(name, ANY))
        if value in ((), []) and name in RANGES and name not in MAY_BE_EMPTY:
            raise ValueError(f"{before}{name} is empty; {allowed}")
        for number in numbers_in(value):
            if not allowed.holds(number):
                limit = f"give at most {allowed.high:g}" if number > allowed.high else allowed
                raise ValueError(f"{before}{name} is {as_given(value)}; {limit}")
        for group, inside in groups_in(value):
            check_ranges(group, inside, f"{before}{name}.")


def numbers_in(value: object) -> Iterator[float]:
    """The numbers of an option: itself, or those in a list or a mapping."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from numbers_in(one)
    elif isinstance(value, Mapping):
        yield from numbers_in(list(value.values()))


def groups_in(value: object) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Names and options of the groups and classes of ours in an option, one level deep."""
    if isinstance(value, dict) and value.keys() == {"class_path", "init_args"}:
        if isinstance(value["init_args"], dict):
            yield str(value["class_path"]).rpartition(".")[2], value["init_args"]
    elif isinstance(value, partial) and isinstance(value.func, type):
        if value.func.__module__.split(".")[0] in ("vae3d", "loaders"):
            yield value.func.__name__, value.keywords
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__, vars(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from groups_in(one)


def as_given(value: object) -> str:
    """An option as a user writes it, but for what is endless."""
    text = str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) < 200 else f"{text[:100]} ..."

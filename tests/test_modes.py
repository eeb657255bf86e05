"""Mode auto takes the exact result by the cheapest way that fits; costs and progress are told."""

import io
from functools import partial

import pytest
import torch
from torch import nn
from toys import tiny_vae

from vae3d.exact.executor import encode_exact
from vae3d.inference import estimate
from vae3d.inference import reconstruct as reconstruct_module
from vae3d.inference.costs import Living, cost
from vae3d.inference.estimate import passes_of_patches, seconds, spell, told
from vae3d.inference.reconstruct import Coding, autoencode, coding_of, mode_of, reconstruct
from vae3d.kernels.progress import part, passed, watched
from vae3d.models.custom_vae import CustomVAE
from vae3d.tracking.console import Gauge

SIZE = (64, 64, 64)


class Unknown(nn.Module):
    """A layer that exact mode has no handler for, and that declares no halo."""

    def forward(self, x):
        return x - x.mean()


@pytest.fixture(scope="module")
def vae():
    return tiny_vae().eval()


@pytest.fixture(scope="module")
def odd():
    vae = tiny_vae().eval()
    vae.decoder.insert(0, Unknown())
    return vae


def test_auto_is_full_where_it_fits_and_exact_where_it_does_not(vae):
    assert Coding("auto", memory_gb=4).choice(vae, SIZE).mode == "full"
    small = Coding("auto", memory_gb=0.01).choice(vae, SIZE)
    assert small.mode == "exact"
    assert small.why.startswith("a full pass takes about") and "0.01 GiB that it may" in small.why
    for mode in ("full", "patch", "exact"):
        assert Coding(mode, (8, 8, 8), memory_gb=0.01).choice(vae, SIZE).mode == mode


def test_auto_takes_patches_only_where_full_and_exact_are_refused_and_says_why(vae, odd):
    tight = partial(Coding, "auto", memory_gb=0.01)
    choice = tight((16, 16, 16)).choice(odd, SIZE)
    assert choice.mode == "patch"
    assert "exact would run Unknown on the whole volume at once" in choice.why
    assert choice.why in told(tight((16, 16, 16)), odd, [SIZE])
    assert tight((16, 16, 16), amp="bf16").choice(vae, SIZE).mode == "patch"
    with pytest.raises(ValueError, match=r"Unknown .*; give --patch_size, or more --memory_gb"):
        tight().choice(odd, SIZE)


def test_auto_gives_to_the_bit_what_the_mode_that_it_takes_gives(vae):
    x = torch.rand(1, 20, 14, 12)
    assert torch.equal(reconstruct(vae, x, "auto"), reconstruct(vae, x, "full"))
    x, tight = torch.rand(1, *SIZE), Coding("auto", memory_gb=0.01)
    assert tight.choice(vae, SIZE, ("encode",)).mode == "exact"
    mean, _ = tight.encode(vae, x)
    assert torch.equal(mean, encode_exact(vae, x, 0.01).mean)


def test_a_2d_model_is_judged_by_its_slices():
    flat = tiny_vae(spatial_dims=2).eval()
    coding = Coding("auto", slice_axis=1)
    assert coding.plane(flat, (512, 400, 300)) == [512, 300]
    assert coding.choice(flat, (512, 400, 300)).mode == "full"


def test_memory_of_a_full_pass_is_foreseen(vae):
    x = torch.rand(1, 1, 96, 64, 64)
    with torch.no_grad(), Living() as living:
        vae.encode(x)
    foreseen = cost(vae, "encode").bytes(x.numel())
    assert 0.8 * living.peak < foreseen < 2 * living.peak


def test_one_line_tells_the_mode_its_cost_and_a_cheaper_one(vae):
    patches = Coding("patch", (32, 32, 32), 0.5)
    line = told(patches, vae, [SIZE, SIZE])
    assert line.startswith("mode patch for 2 volumes of 64 x 64 x 64: about ")
    assert "each voxel goes through the network 3.4 times; --mode auto: about " in line
    assert passes_of_patches(patches, vae, [SIZE]) == 27 * 32**3 / 64**3
    line = told(Coding("auto", memory_gb=4), vae, [SIZE, (8, 8, 8)])
    assert line.startswith("mode full for 2 volumes of up to 64 x 64 x 64: about")
    assert "GiB" in line and "times" not in line
    line = told(Coding("auto", memory_gb=0.01), vae, [SIZE])
    assert "mode exact for 1 volume of" in line and "a full pass takes about" in line
    assert told(Coding("full"), vae, [(8, 8, 8)]) == "mode full for 1 volume of 8 x 8 x 8"
    assert [spell(s) for s in (0.2, 75, 600, 7200)] == ["1 s", "75 s", "10 min", "2.0 h"]


def test_the_line_names_known_faults_of_convolutions_in_the_precision_that_is_asked_for(
    vae, monkeypatch
):
    monkeypatch.setattr(estimate, "_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as commands have it
    line = told(Coding("full", amp="bf16"), vae, [(8, 8, 8)])
    assert line.count("; ") == 2 and "; 3D convolutions, cuDNN 9.10.2: bf16 can give" in line
    assert "convolutions" not in told(Coding("full"), vae, [(8, 8, 8)])


def test_where_volumes_go_in_several_modes_the_cost_is_that_of_each(vae, odd):
    mixed = Coding("auto", (16, 16, 16), memory_gb=0.01)
    line = told(mixed, vae, [(96, 64, 64), (8, 8, 8)])
    assert line.startswith("mode exact for 1 volume and mode full for 1 volume of up to 96 x 64")
    assert float(line.split(", about ")[1].split(" GiB")[0]) <= 0.01, "of what goes in full"
    assert mixed.choice(odd, SIZE).mode == "patch" and mixed.choice(odd, (8, 8, 8)).mode == "full"
    once, both = (seconds(mixed, odd, shapes) for shapes in ([(8, 8, 8)], [SIZE, (8, 8, 8)]))
    passes = passes_of_patches(mixed, odd, [SIZE])
    assert both == pytest.approx(once * (1 + passes * SIZE[0] ** 3 / 8**3))


def test_options_of_patches_without_a_mode_mean_patches_and_that_is_told():
    assert mode_of("auto", overlap=None, blend=None) == ("auto", [])
    mode, lines = mode_of("auto", overlap=0, blend="crop")
    assert mode == "patch" and lines[0].startswith("mode patch, as --overlap and --blend asks")
    assert mode_of("exact", overlap=0.5) == ("exact", [])


def test_latents_of_a_full_pass_and_of_mode_exact_are_decoded_as_memory_allows():
    for made, mode in (("full", "auto"), ("exact", "auto"), ("patch", "patch")):
        by = {"mode": made, "patch_size": [8, 8, 8], "checkpoint": "a"}
        assert coding_of(by)[0].mode == mode
        assert coding_of(by, "exact")[0].mode == "exact"
    coding, lines = coding_of({"mode": "full", "patch_size": [8, 8, 8]}, None, {"overlap": 2})
    assert (coding.mode, coding.overlap) == ("patch", 2) and lines


@pytest.mark.parametrize("mode", ["full", "patch", "exact"])
@pytest.mark.parametrize("dims", [2, 3])
def test_work_tells_how_far_it_has_come_and_changes_nothing(mode, dims, monkeypatch):
    monkeypatch.setattr("vae3d.exact.executor.WORTH_TELLING", 1)
    vae = tiny_vae(spatial_dims=dims).eval()
    x, patch = torch.rand(1, 16, 12, 12), (8,) * dims
    heard: list[float] = []
    with watched(heard.append):
        watching = autoencode(vae, x, mode, patch_size=patch)
    for one, other in zip(watching, autoencode(vae, x, mode, patch_size=patch), strict=True):
        assert torch.equal(one, other)
    assert sum(heard) == pytest.approx(1) and min(heard) >= 0
    assert len(heard) > 10 and max(heard) < 0.5, "no great step at once"


def test_parts_of_parts_sum_up_to_the_whole():
    heard: list[float] = []
    with watched(heard.append):
        with part(0.25):
            passed(0.5)
        with part(0.75):
            for _ in range(3):  # more than it said
                with part(0.5):
                    passed(2.0)
    assert sum(heard) == pytest.approx(1) and heard[0] == 0.125
    passed(1.0)  # nobody hears


def test_a_log_gets_a_line_of_progress_now_and_then_and_short_work_none():
    log = io.StringIO()
    with Gauge("evaluate", every_s=0, stream=log) as gauge:
        gauge.add(0.25)
        gauge.add(0.5)
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("evaluate: 25%  eta 0:00:0") and lines[1].startswith("evaluate: 75%")
    log = io.StringIO()
    for enabled, every_s in ((True, 3600), (False, 0)):
        with Gauge("evaluate", every_s=every_s, stream=log, enabled=enabled) as gauge:
            gauge.add(1.0)
    assert not log.getvalue() and gauge.left() == "0:00:00"


def test_a_terminal_sees_a_line_that_lives(monkeypatch):
    class Tty(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    screen = Tty()
    with Gauge("evaluate", stream=screen) as gauge:
        gauge.add(0.5)
    assert "evaluate" in screen.getvalue() and "50%" in screen.getvalue()


def test_layers_keep_no_hook_when_the_pass_is_over(vae):
    with watched(lambda _: None), reconstruct_module.telling_of_layers(vae, "encoder"):
        assert any(layer._forward_hooks for layer in vae.encoder)
    assert not any(layer._forward_hooks for layer in vae.encoder)


class OfAnother(CustomVAE):
    """A network of another library behind the contract: it has no layers of ours to ask."""

    def __init__(self):
        nn.Module.__init__(self)
        self.net = tiny_vae()
        self.head, self.linear_code, self.spatial_dims = self.net.head, None, 3
        self.factor, self.latent_channels = self.net.factor, self.net.latent_channels
        self.in_channels = self.out_channels = 1
        self.encoder = nn.Conv3d(1, 1, 1)  # nor need a part with such a name be ours

    def encode(self, x):
        return self.net.encode(x)

    def decode(self, z):
        return self.net.decode(z)


@pytest.mark.parametrize("mode", ["full", "patch"])
def test_a_network_of_another_library_goes_through_while_progress_is_shown(mode):
    vae, x, heard = OfAnother().eval(), torch.rand(1, 16, 12, 12), []
    with watched(heard.append):
        recon, *_ = autoencode(vae, x, mode, patch_size=(8, 8, 8))
    wanted, *_ = autoencode(vae.net, x, mode, patch_size=(8, 8, 8))
    torch.testing.assert_close(recon, wanted)
    assert sum(heard) == pytest.approx(1)

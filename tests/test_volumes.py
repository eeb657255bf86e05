"""Networks that judge volumes in slabs: the numbers of one process, whatever their forward does."""

from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from toys import on_ranks

from vae3d.losses.adversarial import Adversarial, Discriminator, PatchDiscriminator
from vae3d.losses.features import DeepBet, FeatureNetwork, MonaiNetwork
from vae3d.losses.perceptual import Perceptual
from vae3d.losses.vae_loss import VAELoss
from vae3d.spatial import slabs
from vae3d.spatial.losses import SlabTerms, SlabViews, check_loss
from vae3d.spatial.slabs import Layout
from vae3d.spatial.volumes import check

SHAPE = {2: (13, 11), 3: (13, 8, 9)}  # slabs of 4 to 7 rows, or 2 to 5
EXACT = {torch.float32: 2e-5, torch.float64: 1e-10}
PATCHES = partial(PatchDiscriminator, channels=8, norm_groups=4)


class Mixed(Discriminator):
    """Many layers that make other numbers of rows, of which the last ranks have none."""

    def __init__(self, dims, channels, norm="BatchNorm"):
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.pool = F.max_pool3d if dims == 3 else F.max_pool2d
        self.mean_pool = F.avg_pool3d if dims == 3 else F.avg_pool2d
        self.first = spectral_norm(conv(channels, 4, 3, padding="same"))
        self.norm = getattr(nn, f"{norm}{dims}d")(4, affine=True)
        self.second = conv(4, 4, 3, 1, 2, dilation=2)
        self.shortcut = conv(4, 4, 1, stride=2, bias=False)
        self.head = conv(8, 1, 4, 1, 1)

    def forward(self, x):
        ends = [1, 1] * (x.ndim - 2)
        a = torch.tanh(self.norm(self.first(x)))
        b = self.second(F.pad(a, ends, mode="replicate")) + 0.1 / (2 + F.pad(a, ends))
        pooled = torch.cat([self.pool(b, 3, 2, 1), self.shortcut(b)], 1)
        c = self.mean_pool(F.silu(pooled, inplace=False), 3, 1, 1)
        return self.head(c).to(torch.promote_types(x.dtype, torch.float32)), [a, c]


def discriminators():
    yield "groups", PATCHES
    yield "one layer, no norm", partial(PATCHES, num_layers=1, norm_groups=0)
    yield "batch norm", Mixed
    yield "instance norm", partial(Mixed, norm="InstanceNorm")


def judged(game, x, recon, whole=None):
    """What both sides make of volumes, and gradients: of the reconstruction, of parameters."""
    x, recon = x.clone(), recon.clone().requires_grad_()
    game.zero_grad(set_to_none=True)
    views = None if whole is None else SlabViews(whole, game)
    of_generator = game(x, recon, 0, views)
    sum(of_generator.values()).backward()
    assert all(p.grad is None for p in game.parameters())
    of_critic = game.critic(x, recon, 0, views)
    of_critic["discriminator_loss"].backward()
    values = torch.stack([*of_generator.values(), *of_critic.values()]).detach()
    grads = {name: p.grad for name, p in game.named_parameters()}
    return values, recon.grad, grads, dict(game.named_buffers())


def prepared(make, dims, dtype, damage=None, **options):
    """A game, volumes, and what one process makes of them."""
    torch.manual_seed(2)
    more = dict(feature_matching_weight=1.0, r1_weight=0.5, adaptive=False)
    game = Adversarial(spatial_dims=dims, discriminator=make, **more, **options).to(dtype)
    x, recon = torch.rand(2, 2, 1, *SHAPE[dims], dtype=dtype)
    before = {name: buffer.clone() for name, buffer in game.named_buffers()}
    values, slope, grads, buffers = judged(game, x, recon)
    buffers = {name: buffer.clone() for name, buffer in buffers.items()}
    for name, buffer in game.named_buffers():
        buffer.copy_(before[name])
    return damage or as_it_is, game, x, recon, (values, slope, grads, buffers)


def of_layers(grads):
    """Those of a layer as one vector: either alone may be nothing but rounding."""
    found = {}
    for name, grad in grads.items():
        layer = name.partition(".parametrizations")[0].removesuffix(".weight").removesuffix(".bias")
        found.setdefault(layer, []).append(grad.flatten())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def compared(world, cases, axis=0):
    """The largest difference of each case on this rank, of gradients relative to their size."""
    found = {}
    for name, (damage, game, x, recon, (values, slope, grads, buffers)) in cases.items():
        layout = Layout(x.shape[2:], (2,) * (x.ndim - 2), axis)
        own = layout.slabs[world.rank]
        with damage():
            mine = judged(game, layout.part(x, *own), layout.part(recon, *own), layout)
        error = [float((mine[0] / values - 1).abs().max())]
        slope_error = mine[1] / world.size - layout.part(slope, *own)
        error.append(float(slope_error.norm() / slope.norm()))
        for grad in mine[2].values():
            dist.all_reduce(grad)
        whole, found_here = of_layers(grads), of_layers(mine[2])
        error += [
            float((found_here[k] / world.size - g).norm() / g.norm()) for k, g in whole.items()
        ]
        error += [float((mine[3][key] - b).abs().max()) for key, b in buffers.items() if b.numel()]
        found[name] = max(error)
    return found


@contextmanager
def as_it_is():
    yield


@contextmanager
def without_a_row():
    """What comes from the rank before lacks its last row."""
    whole = slabs.exchange

    def lossy(layout, *args):
        arrived = whole(layout, *args)()
        for rank, rows in arrived.items():
            if rank == layout.rank - 1:
                rows[:, :, -1] = 0
        return lambda: arrived

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "exchange", lossy)
        yield


@contextmanager
def with_sums_of_its_own(which="sum"):
    """Each rank takes its own sums for everybody's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Layout, which, lambda layout, x: x * layout.size)
        yield


def cases_of(dims, dtype):
    criteria = ("hinge", "least_squares", "non_saturating", "hinge")
    pairs = zip(discriminators(), criteria, strict=True)
    return {
        f"{name} {dims}D {dtype}": prepared(make, dims, dtype, criterion=criterion)
        for (name, make), criterion in pairs
    }


@pytest.mark.parametrize(
    ("ranks", "dims", "dtype", "axis"),
    [
        (3, 3, torch.float64, 0),
        pytest.param(2, 3, torch.float32, 2, marks=pytest.mark.slow),
        pytest.param(4, 2, torch.float32, 1, marks=pytest.mark.slow),
        pytest.param(4, 3, torch.float64, 1, marks=pytest.mark.slow),
    ],
)
def test_a_discriminator_judges_slabs_as_it_does_volumes(ranks, dims, dtype, axis):
    """Both sides, feature matching and the second derivatives of R1; ranks without a logit."""
    faults = [
        f"{name}, rank {rank}: {error:.1e}"
        for rank, found in enumerate(
            on_ranks(ranks, compared, cases_of(dims, dtype), axis, timeout_s=600)
        )
        for name, error in found.items()
        if not error <= EXACT[dtype]
    ]
    assert not faults, "\n".join(faults)


def test_lost_rows_and_sums_of_one_rank_are_noticed():
    damages = {
        "row": (PATCHES, without_a_row),
        "sum": (PATCHES, with_sums_of_its_own),
        "batch": (Mixed, partial(with_sums_of_its_own, "sum_of_teams")),
    }
    cases = {
        name: prepared(make, 2, torch.float64, damage) for name, (make, damage) in damages.items()
    }
    found = on_ranks(2, compared, cases)
    for name in damages:
        assert max(rank[name] for rank in found) > 1e-3


# Frozen networks


class Residual(FeatureNetwork):
    """Layers of MedicalNet: batch norms that are done with learning, dilation, sums in place."""

    spatial_dims = 3

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv3d(1, 6, 7, 2, 3, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm3d(6), nn.BatchNorm3d(6)
        self.conv2 = nn.Conv3d(6, 6, 3, padding=4, dilation=4, bias=False)
        self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool3d(3, 2, 1)
        for bn in (self.bn1, self.bn2):
            bn.running_mean.uniform_(-0.1, 0.1)
            bn.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = residual = self.pool(self.relu(self.bn1(self.conv1(x))))
        out = self.bn2(self.conv2(x))
        out += residual
        return self.relu(out)


class MedicalNet(MonaiNetwork):
    """MONAI's, which standardizes over the volume, with other weights."""

    def __init__(self):
        nn.Module.__init__(self)
        self.name, self.spatial_dims = "medicalnet_resnet10_23datasets", 3
        self.network = nn.ModuleDict({"model": Residual()})


def distances(term, x, recon, weight, whole=None):
    """With a mask and without, and the gradient of both."""
    recon = recon.clone().requires_grad_()
    take = SlabTerms(whole) if whole else lambda term, *args: term(*args)
    values = torch.stack([take(term, x, recon, None, 0, *w) for w in ((), (weight,))])
    values.sum().backward()
    return values.detach(), recon.grad


def distances_of_slabs(world, term, whole, *volumes):
    (values, slope), errors = whole, []
    for axis in (0, 2):
        layout = Layout(volumes[0].shape[2:], (2, 2, 2), axis)
        own = layout.slabs[world.rank]
        mine, grad = distances(term, *(layout.part(v, *own) for v in volumes), layout)
        error = (grad / world.size - layout.part(slope, *own)).norm() / slope.norm()
        errors += [float((mine / values - 1).abs().max()), float(error)]
    return errors


def test_features_of_volumes_are_compared_in_slabs():
    assert_features_equal(MedicalNet, (1, 2, 17, 24, 20))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepbet") is None, reason="pip install deepbet")
def test_deepbet_compares_volumes_in_slabs():
    """It repeats the ends of small volumes."""
    assert_features_equal(DeepBet, (1, 1, 17, 24, 20))


def assert_features_equal(network, shape):
    torch.manual_seed(0)
    term = Perceptual(network=network).double()
    check_loss(VAELoss(perceptual=lambda: term))
    x = torch.rand(shape, dtype=torch.float64)
    recon = x + 0.1 * torch.randn_like(x)
    weight = (torch.rand(x[:, :1].shape).double() * 2 - 0.5).clamp_min(0)
    volumes = x, recon, weight
    whole = distances(term, *volumes)
    for errors in on_ranks(3, distances_of_slabs, term, whole, *volumes, timeout_s=600):
        assert max(errors) < 1e-10


class Resized(Discriminator):
    def forward(self, x):
        return F.interpolate(x, scale_factor=2), []


class Whole(Discriminator):
    def forward(self, x):
        return x.flatten(2).mean(2), []


class Scripted(Discriminator):
    def __init__(self):
        super().__init__()
        self.net = torch.jit.script(nn.ReLU())

    def forward(self, x):
        return self.net(x), []


class Placed(Discriminator):
    def forward(self, x):
        return x * torch.linspace(0, 1, x.shape[2]).view(-1, 1, 1), []


class Circular(Discriminator):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(1, 1, 3, padding=1, padding_mode="circular")

    def forward(self, x):
        return self.conv(x), []


class Hidden(Discriminator):
    def __init__(self):
        super().__init__()
        self.scale = [torch.ones(1, 1, 1, 1)]

    def forward(self, x):
        return x * self.scale[0], []


class Turned(Discriminator):
    def forward(self, x):
        return x.transpose(2, 3), []


class Halved(Discriminator):
    def forward(self, x):
        return x[:, :, ::2], []


class Dropping(Discriminator):
    def forward(self, x):
        return F.dropout(x, 0.5), []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Resized, "Resized calls interpolate, other than for the area"),
        (Whole, "Whole has flatten of axes of space"),
        (Scripted, "Scripted is TorchScript"),
        (Placed, "Placed has a value of its own for each voxel"),
        (Circular, "Circular pads with circular by 1 and 1"),
        (Hidden, "Hidden cannot be run without data"),
        (partial(nn.SyncBatchNorm, 1), "SyncBatchNorm has a SyncBatchNorm; take BatchNorm"),
        (Turned, "Turned has transpose of axes of space"),
        (Halved, "Halved takes a part of a volume"),
        (Dropping, "Dropping drops values"),
        (partial(nn.Conv3d, 1, 1, 200), "has a layer of 200 rows, and the volume has 128"),
    ],
)
def test_what_is_not_known_of_volumes_in_slabs_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        check(make(), 1, 3)

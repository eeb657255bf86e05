"""A mask and the loss: what does not count changes nothing, and the rest is a weighted mean."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from toys import SHAPE, ToyBatch, ToyLoader, on_ranks, tiny_vae, toy_trainer

from vae3d.losses.adversarial import Adversarial, PatchDiscriminator
from vae3d.losses.features import FeatureNetwork
from vae3d.losses.perceptual import Perceptual
from vae3d.losses.reconstruction import (
    L1,
    L2,
    SSIM,
    Charbonnier,
    FocalFrequency,
    GradientDifference,
    LearnedVariance,
)
from vae3d.losses.term import Term
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.posterior import DiagonalGaussian
from vae3d.training.distributed import World
from vae3d.training.memory import Trial
from vae3d.training.task import VAETask, share_weights, weight_of

SIZE = (2, 1, 12, 9, 14)


class Filters(FeatureNetwork):
    """Random convolutions in place of a network that needs a download."""

    def __init__(self, spatial_dims=3):
        super().__init__()
        self.spatial_dims = spatial_dims
        conv = {2: torch.nn.Conv2d, 3: torch.nn.Conv3d}[spatial_dims]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = torch.nn.ModuleList([conv(1, 4, 3, 2, 1), conv(4, 6, 3, 2, 1)])

    def forward(self, x):
        maps = []
        for layer in self.layers:
            x = torch.tanh(layer(x))
            maps.append(x)
        return maps


TERMS = [
    L1,
    L2,
    Charbonnier,
    LearnedVariance,
    partial(SSIM, window=5),
    GradientDifference,
    FocalFrequency,
    partial(Perceptual, network=Filters),
    partial(Perceptual, network=partial(Filters, 2), view="slices"),
]


def triple(seed=0):
    """Volume, reconstruction and a posterior."""
    generator = torch.Generator().manual_seed(seed)
    x, noise = torch.rand(2, *SIZE, generator=generator)
    mean = torch.randn(2, 2, 3, 3, 4, generator=generator)
    return x, x + 0.2 * (noise - 0.5), DiagonalGaussian(mean, torch.zeros_like(mean))


def region() -> torch.Tensor:
    """Weights 0, 1 and 3 of mean 1."""
    weight = torch.zeros(2, 1, *SIZE[2:])
    weight[:, :, 2:9, 1:8, 3:12] = 1
    weight[1, :, 4:7, 3:5, 4:10] = 3
    return weight / weight.mean()


def garbage(kind, like):
    return {"noise": 1e3 * torch.randn(like.shape), "nan": torch.full_like(like, torch.nan)}[kind]


@pytest.mark.parametrize("kind", ["noise", "nan"])
@pytest.mark.parametrize("term", TERMS, ids=lambda term: str(getattr(term, "func", term)))
def test_what_lies_under_a_mask_changes_neither_loss_nor_gradient(term, kind):
    x, recon, posterior = triple()
    weight = region()
    loss, seen = VAELoss(recon=term), weight > 0
    found = []
    for dirt in (None, kind):
        a, b = x.clone(), recon.clone().requires_grad_(True)
        dirty = b
        if dirt:
            a = torch.where(seen, a, garbage(dirt, a))
            dirty = torch.where(seen, b, garbage(dirt, a))
        value = loss(a, dirty, posterior, 0, weight=weight)["loss"]
        found.append((value.item(), *torch.autograd.grad(value, b)))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    slope = found[0][1]
    assert slope[seen].abs().sum() > 0 and not slope[~seen].any()


@pytest.mark.parametrize("term", TERMS, ids=lambda term: str(getattr(term, "func", term)))
def test_weights_of_one_are_no_mask_and_zeros_are_no_error(term):
    x, recon, posterior = triple()
    loss = VAELoss(recon=term)
    plain = loss(x, recon, posterior, 0)["recon"]
    ones = loss(x, recon, posterior, 0, weight=torch.ones(2, 1, *SIZE[2:]))["recon"]
    assert torch.allclose(plain, ones, rtol=1e-5)
    recon = recon.requires_grad_(True)
    value = loss(x, recon, posterior, 0, weight=torch.zeros(2, 1, *SIZE[2:]))["loss"]
    (slope,) = torch.autograd.grad(value, recon)
    assert value.isfinite() and not slope.any()


def test_pointwise_terms_are_the_sum_of_w_e_over_the_sum_of_w():
    x, recon, _ = triple()
    weight = region()
    for term, distance in ((L1(), (recon - x).abs()), (L2(), (recon - x).square())):
        expected = (weight * distance).sum() / weight.sum()
        assert torch.allclose(term(x, recon, weight=weight), expected)
    both = torch.cat((weight, 2 - weight.clamp(max=2)), 1)  # a weight for each channel
    pair = [t.repeat(1, 2, 1, 1, 1) for t in (x, recon)]
    both = both / both.mean()
    expected = (both * (pair[1] - pair[0]).abs()).sum() / both.sum()
    assert torch.allclose(L1()(*pair, weight=both), expected)


def test_windows_weigh_what_their_middle_does_and_edges_the_lesser_of_their_ends():
    x, recon, _ = triple()
    weight = torch.zeros(2, 1, *SIZE[2:])
    weight[0, 0, 5, 4, 6] = weight.numel()  # one voxel counts, mean 1
    alone = SSIM(window=5)(x[:1, :, 3:8, 2:7, 4:9], recon[:1, :, 3:8, 2:7, 4:9])
    windows = 2 * (12 - 4) * (9 - 4) * (14 - 4)
    expected = alone * weight.numel() / windows
    assert torch.allclose(SSIM(window=5)(x, recon, weight=weight), expected, rtol=1e-4)
    assert GradientDifference()(x, recon, weight=weight) == 0  # no edge has two ends that count
    weight[0, 0, 6, 4, 6] = weight.numel() / 2
    edge = [t[0, 0, 5:7, 4, 6].diff().abs() for t in (x, recon)]
    expected = (edge[0] - edge[1]).abs().sum() * weight.numel() / 2 / (2 * 11 * 9 * 14) / 3
    assert torch.allclose(GradientDifference()(x, recon, weight=weight), expected, rtol=1e-4)


def test_frequencies_without_focus_are_the_weighted_squared_error():
    x, recon, _ = triple()
    value = FocalFrequency(alpha=0)(x, recon, weight=region())
    assert torch.allclose(value, L2()(x, recon, weight=region()), rtol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_discriminator_and_its_generator_see_nothing_under_a_mask(spatial_dims):
    net = partial(PatchDiscriminator, channels=8, num_layers=1)
    game = partial(Adversarial, spatial_dims=spatial_dims, discriminator=net, adaptive=False,
                   feature_matching_weight=1.0, r1_weight=0.1)  # fmt: skip
    loss, weight = VAELoss(adversarial=game), region()
    x, recon, posterior = triple()
    dirty = [torch.where(weight > 0, t, garbage("nan", t)) for t in (x, recon)]
    found = []
    for a, b in ((x, recon), dirty):
        b = b.clone().requires_grad_(True)
        terms = loss(a, b, posterior, 0, weight=weight)
        (slope,) = torch.autograd.grad(terms["loss"], b)
        critic = loss.discriminator_loss(a, b, 0, weight=weight)["discriminator_loss"]
        slopes = torch.autograd.grad(critic, [*loss.discriminator.parameters()])
        found.append((terms["loss"], critic, slope, *slopes))
        assert not slope[(weight == 0)].any()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_term_that_knows_no_masks_is_refused_by_name_with_one_and_works_without():
    class Mine(Term):
        def forward(self, x, recon, posterior, step):
            return (x - recon).abs().mean()

    loss = VAELoss(extra=[Mine])
    x, recon, posterior = triple()
    assert loss(x, recon, posterior, 0)["mine"] > 0
    with pytest.raises(ValueError, match=r"loss: Mine does not know what a mask is: .* data.mask"):
        loss(x, recon, posterior, 0, weight=region())


# Training


@dataclass
class MaskedBatch(ToyBatch):
    weight: torch.Tensor | None = None
    mean_weight: float | None = None

    def to(self, device, non_blocking=False):
        return replace(self, image=self.image.to(device))


class MaskedLoader(ToyLoader):
    """Toy samples of which very different shares count, of one nothing."""

    def __init__(self, samples=10, batch_size=2, rank=0, world_size=1):
        super().__init__(samples, batch_size, rank, world_size)
        shares = torch.linspace(0, 0.9, samples).view(-1, 1, 1, 1, 1)
        draws = torch.rand(samples, 1, *SHAPE, generator=torch.Generator().manual_seed(2))
        self.weights = (draws < shares) * (1 + torch.arange(samples) % 3).view(-1, 1, 1, 1, 1)
        self.weights = self.weights.float()
        self.images = self.images * (self.weights > 0)

    def stream(self):
        for batch in super().stream():
            yield MaskedBatch(batch.image, batch.index, self.weights[batch.index])


def weights_of(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.task.network.parameters()])


def masked_run(folder, world=None, batch_size=2, **options):
    world = world or World()
    loader = MaskedLoader(10, batch_size, world.rank, world.size)
    trainer = toy_trainer(folder, world, loader=loader, max_steps=3, **options)
    trainer.fit()
    return weights_of(trainer), trainer.tracker.losses("train/recon")


def test_accumulated_masked_batches_equal_the_large_batch(tmp_path):
    big, losses = masked_run(tmp_path / "a", batch_size=4)
    small, again = masked_run(tmp_path / "b", batch_size=1, grad_accum=4)
    assert torch.allclose(big, small, atol=2e-6) and losses == pytest.approx(again, rel=1e-5)


def _masked_rank(world, folder):
    return masked_run(f"{folder}/{world.rank}", world, batch_size=1, grad_accum=2)[0]


def test_two_ranks_with_masks_equal_one(tmp_path):
    one, _ = masked_run(tmp_path / "one", batch_size=4)
    for weights in on_ranks(2, _masked_rank, str(tmp_path)):
        assert torch.allclose(weights, one, atol=2e-6)


def test_a_step_s_loss_is_the_weighted_mean_over_all_of_its_voxels():
    loader = MaskedLoader(batch_size=5)
    batch = next(loader.stream())
    task = VAETask(tiny_vae().eval(), VAELoss())
    task(batch, 0)
    x, recon, _ = task._last
    expected = (batch.weight * (recon - x).abs()).sum() / batch.weight.sum()
    parts = [
        MaskedBatch(batch.image[rows], batch.index[rows], batch.weight[rows])
        for rows in (slice(0, 1), slice(1, 3), slice(3, 5))
    ]
    shares = [len(part.index) / 5 for part in parts]
    values = [task(part, 0)["recon"] for part in share_weights(parts, World())]
    total = sum(share * value for share, value in zip(shares, values, strict=True))
    assert torch.allclose(total, expected, rtol=1e-5)
    alone = task(parts[1], 0)["recon"]  # a batch that was told nothing is weighted by itself
    x, recon, _ = task._last
    w = parts[1].weight
    assert torch.allclose(alone, (w * (recon - x).abs()).sum() / w.sum(), rtol=1e-5)


def test_an_update_in_which_nothing_counts_is_finite():
    batch = next(MaskedLoader().stream())
    batch.weight = torch.zeros_like(batch.weight)
    for window in ([batch], share_weights([batch, batch], World())):
        assert not weight_of(window[0]).any()
        terms = VAETask(tiny_vae(), VAELoss())(window[0], 0)
        assert terms["recon"] == 0 and terms["loss"].isfinite()


def test_volumes_of_other_sizes_count_by_their_voxels():
    small = MaskedBatch(torch.rand(1, 1, 4, 4, 4), torch.tensor([0]), torch.ones(1, 1, 4, 4, 4))
    large = MaskedBatch(torch.rand(3, 1, 8, 4, 4), torch.arange(3), torch.rand(3, 1, 8, 4, 4))
    window = share_weights([small, large], World())
    errors = [torch.rand_like(batch.image) for batch in window]
    value = sum(
        len(batch.index) / 4 * (weight_of(batch) * error).mean()
        for batch, error in zip(window, errors, strict=True)
    )
    total = small.weight.sum() + large.weight.sum()
    expected = sum((b.weight * e).sum() for b, e in zip(window, errors, strict=True)) / total
    assert torch.allclose(value, expected)


def test_the_memory_of_a_batch_is_tried_with_weights_where_there_will_be_some():
    seen = []

    class Watched(VAETask):
        def forward(self, batch, step):
            seen.append(batch.weight)
            return super().forward(batch, step)

    task = Watched(tiny_vae(), VAELoss())
    assert Trial(task, (1, 8, 4, 8), num_weights=1).peak_bytes(2) > 0
    assert Trial(task, (1, 8, 4, 8)).peak_bytes(2) > 0
    assert seen[0].shape == (2, 1, 8, 4, 8) and seen[1] is None

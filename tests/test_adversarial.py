import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from toys import on_ranks

from vae3d.kernels.steps import plain
from vae3d.losses.adversarial import CRITERIA, Adversarial, PatchDiscriminator
from vae3d.losses.features import FeatureNetwork
from vae3d.losses.kl import KL
from vae3d.losses.perceptual import Perceptual
from vae3d.losses.reconstruction import SSIM, Charbonnier, FocalFrequency, LearnedVariance
from vae3d.losses.slices import draw_slices, mean_over_slices, take_slices
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.models.posterior import DiagonalGaussian

SMALL = partial(PatchDiscriminator, channels=8, num_layers=2)
SHAPE = (2, 1, 16, 12, 20)


def pair(shape=SHAPE):
    torch.manual_seed(1)
    x = torch.rand(shape)
    return x, (x + 0.1 * torch.randn(shape)).requires_grad_(True)


def posterior_of():
    return DiagonalGaussian(torch.randn(2, 2, 4, 3, 5), torch.randn(2, 2, 4, 3, 5))


def game(**options):
    torch.manual_seed(2)
    return Adversarial(**{"discriminator": SMALL, "adaptive": False} | options)


# Slices


def test_slices_are_bounded_reach_every_plane_and_depend_on_seed_and_step_alone():
    draws = [draw_slices((16, 12, 20), 6, step, seed=3) for step in range(50)]
    assert all([len(axis) for axis in picks] == [2, 2, 2] for picks in draws)
    assert draws == [draw_slices((16, 12, 20), 6, step, seed=3) for step in range(50)]
    assert draws != [draw_slices((16, 12, 20), 6, step, seed=4) for step in range(50)]
    firsts = [[len(a) for a in draw_slices((16, 12, 20), 1, step)] for step in range(50)]
    assert {tuple(f) for f in firsts} == {(1, 0, 0), (0, 1, 0), (0, 0, 1)}
    for axis, size in enumerate((16, 12, 20)):
        seen = {index for picks in draws for index in picks[axis]}
        assert seen <= set(range(size)) and {min(seen), max(seen)} == {0, size - 1}


def test_slices_hold_the_planes_they_name_and_are_averaged_by_their_number():
    volume = torch.arange(2 * 3 * 4 * 5.0).view(1, 2, 3, 4, 5)
    picks = [[1], [], [0, 4]]
    sagittal, axial = take_slices(volume, picks)
    assert torch.equal(sagittal, volume[:, :, 1])
    assert torch.equal(axial, torch.cat([volume[..., 0], volume[..., 4]]))
    values = [torch.tensor(1.0), torch.tensor(4.0)]
    assert mean_over_slices(values, picks).item() == pytest.approx(3.0)


# Criteria


def test_criteria_are_those_of_the_papers():
    logit = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0])
    real, fake, generator = CRITERIA["hinge"]
    assert real(logit).tolist() == [4.0, 1.5, 1.0, 0.5, 0.0]
    assert fake(logit).tolist() == [0.0, 0.5, 1.0, 1.5, 4.0]
    assert generator(logit).tolist() == [3.0, 0.5, 0.0, -0.5, -3.0]
    real, fake, generator = CRITERIA["least_squares"]
    assert real(logit).tolist() == [8.0, 1.125, 0.5, 0.125, 2.0]
    assert fake(logit).tolist() == [4.5, 0.125, 0.0, 0.125, 4.5]
    assert generator(logit).tolist() == real(logit).tolist()
    real, fake, generator = CRITERIA["non_saturating"]
    p = torch.sigmoid(logit.double())
    assert torch.allclose(real(logit.double()), -p.log())
    assert torch.allclose(fake(logit.double()), -(1 - p).log())
    assert torch.allclose(generator(logit.double()), -p.log())


def test_criteria_do_not_damp_confident_logits():
    logit = torch.tensor([-20.0], requires_grad=True)
    for name, slope in (("hinge", 1.0), ("least_squares", 21.0), ("non_saturating", 1.0)):
        (got,) = torch.autograd.grad(CRITERIA[name][2](logit).sum(), logit)
        assert abs(got.item()) == pytest.approx(slope, rel=1e-4), name  # tanh would leave 1e-17


# Discriminator


@pytest.mark.parametrize("dims", [2, 3])
def test_discriminator_judges_overlapping_patches_of_each_sample_by_itself(dims):
    net = PatchDiscriminator(dims, 2, channels=8, num_layers=2)
    x = torch.rand((3, 2, 16, 12, 20)[: 2 + dims])
    logits, features = net(x)
    assert logits.shape == (3, 1, 4, 3, 5)[: 2 + dims]
    assert [f.shape[1] for f in features] == [8, 16, 32]
    alone, _ = net(x[1:2])
    assert torch.allclose(alone, logits[1:2], atol=1e-6)


def test_too_small_a_patch_and_other_mistakes_are_one_line_errors():
    x, recon = pair((1, 1, 2, 16, 16))
    for wrong, key in [
        (lambda: game(spatial_dims=3)(x, recon, 0), "num_layers"),
        (lambda: game(in_channels=3)(x, recon, 0), "Adversarial.in_channels is 3"),
        (lambda: game(spatial_dims=3)(x[:, :, 0], recon[:, :, 0], 0), "Adversarial.spatial_dims"),
        (lambda: game(criterion="wgan"), "Adversarial.criterion is 'wgan'"),
        (lambda: game(num_slices=0), "Adversarial.num_slices is 0"),
        (lambda: PatchDiscriminator(3, 1, channels=12), "channels 12"),
    ]:
        with pytest.raises(ValueError, match=key) as caught:
            wrong()
        assert "\n" not in str(caught.value)


# The two players


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_losses_equal_a_plain_implementation(spatial_dims, criterion):
    x, recon = pair((2, 1, 16, 16, 16))
    adversarial = game(spatial_dims=spatial_dims, criterion=criterion, num_slices=5)
    net = adversarial.critic.net
    of_real, of_fake, of_generator = CRITERIA[criterion]
    if spatial_dims == 3:
        real, fake = net(x)[0], net(recon)[0]
    else:
        picks = draw_slices((16, 16, 16), 5, 7)
        real, fake = (net(torch.cat(take_slices(v, picks)))[0] for v in (x, recon))
    values = adversarial(x, recon, 7)
    assert values["adversarial"].item() == pytest.approx(of_generator(fake).mean().item(), rel=1e-5)
    out = adversarial.critic(x, recon, 7)
    wanted = of_real(real).mean() + of_fake(fake).mean()
    assert out["discriminator_loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert out["logits_real"].item() == pytest.approx(real.mean().item(), abs=1e-6)
    assert out["logits_fake"].item() == pytest.approx(fake.mean().item(), abs=1e-6)


def test_generator_leaves_no_gradient_in_the_discriminator_and_the_reverse():
    x, recon = pair()
    loss = VAELoss(adversarial=partial(game, feature_matching_weight=1.0))
    posterior = posterior_of()
    loss(x, recon, posterior, 0)["loss"].backward()
    assert recon.grad.abs().sum() > 0
    assert all(p.grad is None for p in loss.discriminator.parameters())
    recon.grad = None
    loss.discriminator_loss(x, recon, 0)["discriminator_loss"].backward()
    assert recon.grad is None
    assert all(p.grad.abs().sum() > 0 for p in loss.discriminator.parameters())


def test_generator_passes_through_a_frozen_discriminator_all_the_same():
    x, recon = pair()
    adversarial = game()
    adversarial.critic.requires_grad_(False)
    adversarial(x, recon, 0)["adversarial"].backward()
    assert recon.grad.abs().sum() > 0


def test_adversarial_gradient_reaches_voxels_outside_the_data_range():
    x, recon = pair()
    far = (recon.detach() + 3).requires_grad_(True)
    game(spatial_dims=3)(x, far, 0)["adversarial"].backward()
    assert (far.grad != 0).float().mean() > 0.9


def test_nothing_happens_before_the_start_step():
    x, recon = pair()
    adversarial = game(start_step=5, feature_matching_weight=1.0)
    loss = VAELoss(adversarial=lambda: adversarial)
    before, after = adversarial(x, recon, 4), adversarial(x, recon, 5)
    assert [v.item() for v in before.values()] == [0.0, 0.0]
    assert before.keys() == after.keys() and after["feature_matching"].item() > 0
    assert not loss.discriminator_active(4) and loss.discriminator_active(5)


def test_feature_matching_equals_equation_4_of_wang_and_vanishes_at_the_input():
    x, recon = pair()
    adversarial = game(spatial_dims=3, feature_matching_weight=1.0)
    wanted = torch.stack(
        [
            (a - b).abs().mean()
            for a, b in zip(
                adversarial.critic.net(x)[1], adversarial.critic.net(recon)[1], strict=True
            )
        ]
    ).mean()
    assert adversarial(x, recon, 0)["feature_matching"].item() == pytest.approx(
        wanted.item(), rel=1e-5
    )
    assert adversarial(x, x.clone(), 0)["feature_matching"].item() == 0


def test_r1_is_the_squared_slope_at_real_data_and_keeps_its_scale_with_the_patch_size():
    x, recon = pair((2, 1, 16, 16, 16))
    adversarial = game(spatial_dims=3, r1_weight=2.0, r1_every=4)
    plain, net = game(spatial_dims=3), adversarial.critic.net
    real = x.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(net(real)[0].sum(), real)
    wanted = 0.5 * slope.square().flatten(1).sum(1).mean() / 4**3
    out = adversarial.critic(x, recon, 4)
    assert out["r1"].item() == pytest.approx(wanted.item(), rel=1e-5)
    base = plain.critic(x, recon, 4)["discriminator_loss"].item()
    assert out["discriminator_loss"].item() == pytest.approx(base + 2 * 4 * wanted.item(), rel=1e-5)
    assert "r1" not in adversarial.critic(x, recon, 5)
    large = adversarial.critic(x.repeat(1, 1, 2, 2, 2), recon.repeat(1, 1, 2, 2, 2), 4)["r1"]
    assert large.item() == pytest.approx(wanted.item(), rel=0.5)  # a sum over voxels gives 8x


def test_r1_flattens_the_discriminator():
    x, recon = pair()
    steep, flat = (game(spatial_dims=3, r1_weight=weight) for weight in (0.0, 100.0))
    slopes = []
    for adversarial in (steep, flat):
        optimizer = torch.optim.Adam(adversarial.critic.parameters(), 4e-3)
        for step in range(8):
            optimizer.zero_grad()
            adversarial.critic(x, recon, step)["discriminator_loss"].backward()
            optimizer.step()
        slopes.append(adversarial.critic._r1(x, 0, adversarial.critic.views).item())
    assert slopes[1] < 0.2 * slopes[0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_discriminator_learns_to_tell_smooth_reconstructions_from_inputs(criterion):
    x, _ = pair()
    blurred = torch.nn.functional.avg_pool3d(x, 3, 1, 1)
    adversarial = game(criterion=criterion)
    optimizer = torch.optim.Adam(adversarial.critic.parameters(), 2e-3)
    for step in range(40):
        optimizer.zero_grad()
        out = adversarial.critic(x, blurred, step)
        out["discriminator_loss"].backward()
        optimizer.step()
    assert out["logits_real"] > out["logits_fake"] + 0.5


# Adaptive weight


def layer_and_output(x):
    """A last layer (weight) and its output, as a decoder would have them."""
    torch.manual_seed(3)
    layer = torch.nn.Conv3d(1, 1, 3, padding=1)
    return layer.weight, layer(x)


def test_adaptive_weight_is_the_ratio_of_the_last_layers_gradients():
    x, _ = pair()
    weight, recon = layer_and_output(x)
    loss = VAELoss(adversarial=partial(game, adaptive=True, weight=0.5))
    posterior = posterior_of()
    terms = loss(x, recon, posterior, 0, last_layer=weight)
    assert terms["adversarial_weight"].item() == 0.0  # nothing measured yet
    loss.after_step()
    (of_recon,) = torch.autograd.grad((recon - x).abs().mean(), weight, retain_graph=True)
    (of_game,) = torch.autograd.grad(
        loss.adversarial(x, recon, 0)["adversarial"], weight, retain_graph=True
    )
    wanted = 0.5 * (of_recon.norm() / (of_game.norm() + 1e-6)).item()
    terms = loss(x, recon, posterior, 1, last_layer=weight)
    assert terms["adversarial_weight"].item() == pytest.approx(wanted, rel=1e-4)
    assert loss.state_dict()["adversarial.adaptive_weight"].item() == pytest.approx(
        2 * wanted, rel=1e-4
    )


def test_adaptive_weight_is_left_alone_by_validation_and_by_non_finite_gradients():
    x, _ = pair()
    weight, recon = layer_and_output(x)
    loss = VAELoss(adversarial=partial(game, adaptive=True))
    posterior = posterior_of()
    loss(x, recon, posterior, 0, last_layer=weight)
    loss.after_step()
    before = loss.adversarial.adaptive_weight.item()
    with torch.no_grad():
        loss(x, recon * 3, posterior, 1)  # needs no last layer
    loss.after_step()
    loss(x, recon * math.nan, posterior, 1, last_layer=weight)
    loss.after_step()
    assert before > 0 and loss.adversarial.adaptive_weight.item() == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_game_holds_under_autocast(dtype):
    x, _ = pair()
    loss = VAELoss(
        adversarial=partial(game, adaptive=True, feature_matching_weight=1.0, r1_weight=1.0)
    )
    posterior = posterior_of()
    exact = copy.deepcopy(loss)
    results = []
    for run, enabled in ((loss, True), (exact, False)):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            weight, recon = layer_and_output(x)
            terms = run(x, recon, posterior, 0, last_layer=weight)
            terms |= run.discriminator_loss(x, recon, 0)
        run.after_step()
        (terms["loss"] + terms["discriminator_loss"]).backward()
        terms["adaptive"] = run.adversarial.adaptive_weight
        results.append({name: value.item() for name, value in terms.items()})
        assert all(p.grad.isfinite().all() for p in run.discriminator.parameters())
    mixed, full = results
    assert mixed == pytest.approx(full, rel=0.1, abs=0.02)
    assert mixed["r1"] == pytest.approx(full["r1"], rel=1e-5)  # a float32 island


# Accumulation, ranks, resume: with every loss switched on


class Features(FeatureNetwork):
    """A frozen network of one convolution."""

    spatial_dims = 2

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.conv = torch.nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        return [torch.relu(self.conv(x))]


def everything():
    return VAELoss(
        recon=partial(LearnedVariance, base=Charbonnier),
        kl=partial(KL, weight=1e-2, target_std=1.0, free_bits=0.01, warmup_steps=3),
        perceptual=partial(Perceptual, view="slices", network=Features),
        adversarial=partial(
            game, adaptive=True, feature_matching_weight=0.5, r1_weight=0.1, start_step=1
        ),
        extra=[SSIM, FocalFrequency],
    )


class Step(torch.nn.Module):
    """Model and loss in one forward, as a trainer wraps them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.vae = CustomVAE(
            channels=(4, 8),
            num_res_blocks=1,
            latent_channels=2,
            norm=partial(GroupNorm, num_groups=4),
        )
        self.loss = everything()

    def forward(self, x, step):
        recon, posterior = self.vae(x, sample_posterior=False)
        return recon, self.loss(x, recon, posterior, step, last_layer=self.vae.last_layer)


def run_steps(steps, micro_batches, wrap=lambda module: module, module=None, first=0):
    """Train a few steps; return the module and the losses, reduced over micro-batches."""
    module = module or Step()
    module.loss.discriminator.requires_grad_(False)
    generator = wrap(module)
    module.loss.discriminator.requires_grad_(True)
    critic = wrap(module.loss.discriminator)
    of_vae = [*module.vae.parameters(), *module.loss.generator_parameters()]
    optimizers = [
        torch.optim.SGD(of_vae, 0.05),
        torch.optim.SGD(module.loss.discriminator.parameters(), 0.05),
    ]
    losses = []
    for step in range(first, first + steps):
        batches = micro_batches(step)
        samples = sum(len(x) for x in batches)
        totals = torch.zeros(2)
        for x in batches:
            share = len(x) / samples
            recon, terms = generator(x, step)
            (share * terms["loss"]).backward()
            totals[0] += share * terms["loss"].detach()
            if module.loss.discriminator_active(step):
                out = module.loss.discriminator_loss(x, recon, step, critic)
                (share * out["discriminator_loss"]).backward()
                totals[1] += share * out["discriminator_loss"].detach()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        module.loss.after_step()
        losses.append(totals)
    return module, torch.stack(losses)


def batch_of(step):
    return torch.rand((4, 1, 16, 12, 12), generator=torch.Generator().manual_seed(step))


def assert_same_state(one, two):
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=2e-5), name


def test_accumulated_micro_batches_equal_the_large_batch_with_every_loss_on():
    one, losses = run_steps(4, lambda step: [batch_of(step)])
    many, accumulated = run_steps(4, lambda step: list(batch_of(step).split([1, 2, 1])))
    assert torch.allclose(losses, accumulated, rtol=1e-4, atol=1e-5)
    assert one.loss.adversarial.adaptive_weight > 0 and one.loss.terms["kl"].factor != 1
    assert_same_state(one, many)


@pytest.mark.parametrize("mode", ["block", "level"])
def test_activation_checkpointing_changes_no_digit_with_every_loss_on(mode):
    plain, losses = run_steps(3, lambda step: [batch_of(step)])
    module = Step()
    module.vae.set_checkpointing(mode)
    saving, same = run_steps(3, lambda step: [batch_of(step)], module=module)
    assert torch.equal(losses, same)
    for (name, a), b in zip(plain.state_dict().items(), saving.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
def test_adaptive_weight_walks_a_compiled_model_too():
    _, losses = run_steps(2, lambda step: [batch_of(step)], first=1)
    module = Step()
    module.vae.decoder.compile()
    with plain():
        _, same = run_steps(2, lambda step: [batch_of(step)], module=module, first=1)
    assert torch.allclose(losses, same, rtol=1e-4, atol=1e-5)


def test_no_loss_waits_for_the_device(monkeypatch):
    module = Step()

    def stop(*_, **__):
        raise AssertionError("a tensor was read by the host")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, stop)
    for step in range(3):
        x = batch_of(step)
        with plain():  # the kernels for the CPU may read what is already there
            recon, terms = module(x, step)
        terms["loss"].backward()
        if module.loss.discriminator_active(step):
            module.loss.discriminator_loss(x, recon, step)["discriminator_loss"].backward()
        module.loss.after_step()


def test_resumed_run_equals_the_uninterrupted_one_with_every_loss_on():
    whole, losses = run_steps(4, lambda step: [batch_of(step)])
    half, first = run_steps(2, lambda step: [batch_of(step)])
    resumed = Step()
    resumed.load_state_dict(half.state_dict())
    resumed, second = run_steps(2, lambda step: [batch_of(step)], module=resumed, first=2)
    assert torch.equal(torch.cat((first, second)), losses)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_resume_that_forgets_the_controllers_is_noticed():
    _, losses = run_steps(4, lambda step: [batch_of(step)])
    half, _ = run_steps(2, lambda step: [batch_of(step)])
    state = half.state_dict()
    for forgotten in ("loss.terms.kl.factor", "loss.adversarial.adaptive_weight"):
        resumed = Step()
        resumed.load_state_dict({k: v for k, v in state.items() if k != forgotten}, strict=False)
        _, second = run_steps(2, lambda step: [batch_of(step)], module=resumed, first=2)
        assert not torch.equal(second, losses[2:]), forgotten


def train_a_rank(world):
    """Train one of two ranks on its half of each batch."""
    module, losses = run_steps(
        3, lambda step: [batch_of(step).split(2)[world.rank]], wrap=DistributedDataParallel
    )
    dist.all_reduce(losses)
    return {"state": module.state_dict(), "losses": losses / 2}


def test_two_ranks_under_ddp_equal_one_process_with_every_loss_on():
    ranks = on_ranks(2, train_a_rank)
    one, losses = run_steps(3, lambda step: [batch_of(step)])
    assert torch.allclose(ranks[0]["losses"], losses, rtol=1e-4, atol=1e-5)
    for name, value in one.state_dict().items():
        a, b = ranks[0]["state"][name], ranks[1]["state"][name]
        assert torch.equal(a, b), f"{name}: the ranks drifted apart"
        assert torch.allclose(a, value, rtol=1e-3, atol=2e-5), name

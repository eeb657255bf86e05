import math
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from vae3d.config import parse
from vae3d.losses.adversarial import Adversarial, PatchDiscriminator
from vae3d.losses.kl import KL
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
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.models.posterior import DiagonalGaussian

SHAPE = (2, 1, 16, 12, 20)
DISTANCES = [L1, L2, SSIM, GradientDifference, FocalFrequency]


def test_the_room_opens_every_term_of_it_by_name():
    namespace = {}
    exec("from vae3d.losses import *", namespace)  # what `__all__` promises
    assert namespace["VAELoss"] is VAELoss and namespace["SSIM"] is SSIM
    terms = {cls.__name__ for cls in Term.__subclasses__() if cls.__module__.startswith("vae3d.")}
    assert terms - {"Pointwise"} <= set(namespace), "a new term is opened, too"
    with pytest.raises(ImportError, match="no_such_term"):
        from vae3d.losses import no_such_term  # noqa: F401


def pair(shape=SHAPE, noise=0.1):
    """A smooth volume in [0, 1] and a noisy version that leaves this range."""
    x = torch.rand(shape)
    for axis in range(2, len(shape)):
        x = (x + x.roll(1, axis)) / 2
    return x, x + noise * torch.randn(shape)


def posterior_of(shape=(2, 4, 4, 3, 5), std=1.0):
    return DiagonalGaussian(std * torch.randn(shape), 0.3 * torch.randn(shape) - 1)


def tiny_vae():
    return CustomVAE(
        channels=(4, 8),
        num_res_blocks=1,
        latent_channels=2,
        norm=partial(GroupNorm, num_groups=4),
    )


# Reconstruction terms


def test_pointwise_terms_are_means_over_voxels():
    x, recon = pair()
    error = (recon - x).numpy()
    assert L1()(x, recon).item() == pytest.approx(np.abs(error).mean(), rel=1e-5)
    assert L2()(x, recon).item() == pytest.approx((error**2).mean(), rel=1e-5)
    wanted = np.sqrt(error**2 + 0.05**2).mean()
    assert Charbonnier(eps=0.05)(x, recon).item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 16, 20), (1, 1, 14, 12, 16)])
@pytest.mark.parametrize(("window", "sigma"), [(11, 1.5), (7, None)])
def test_ssim_equals_scikit_image(shape, window, sigma):
    x, recon = pair(shape)
    ours = 1 - SSIM(window=window, sigma=sigma)(x, recon).item()
    options = {"gaussian_weights": True, "sigma": sigma} if sigma else {"win_size": window}
    theirs = structural_similarity(
        x[0, 0].double().numpy(),
        recon[0, 0].double().numpy(),
        data_range=1.0,
        use_sample_covariance=False,
        **options,
    )
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("dims", [2, 3])
def test_ssim_equals_monai(dims):
    from monai.losses import SSIMLoss

    x, recon = pair((2, 2, 16, 12, 14)[: 2 + dims])
    ours, theirs = SSIM(data_range=2.0)(x, recon), SSIMLoss(dims, data_range=2.0)(recon, x)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)


def test_ssim_keeps_its_digits_far_from_zero():
    x, recon = pair((1, 1, 16, 12, 14), noise=0.05)
    exact = SSIM()(x.double(), recon.double()).item()
    assert SSIM()(x, recon).item() == pytest.approx(exact, abs=1e-4)


def test_gradient_difference_equals_equation_6_of_mathieu():
    x, recon = pair()
    wanted = np.mean(
        [
            np.abs(
                np.abs(np.diff(x.numpy(), axis=a)) - np.abs(np.diff(recon.numpy(), axis=a))
            ).mean()
            for a in (2, 3, 4)
        ]
    )
    assert GradientDifference()(x, recon).item() == pytest.approx(wanted, rel=1e-5)
    assert GradientDifference()(x, x + 0.3).item() == pytest.approx(0, abs=1e-6)


def test_focal_frequency_equals_its_definition_and_is_l2_without_focus():
    x, recon = pair()
    gap = np.fft.fftn(recon.double().numpy() - x.double().numpy(), axes=(2, 3, 4), norm="ortho")
    focus = np.abs(gap) / np.abs(gap).max(axis=(2, 3, 4), keepdims=True)
    wanted = (focus * np.abs(gap) ** 2).mean()
    assert FocalFrequency()(x, recon).item() == pytest.approx(wanted, rel=1e-4)
    flat, l2 = FocalFrequency(alpha=0)(x, recon), L2()(x, recon)
    assert flat.item() == pytest.approx(l2.item(), rel=1e-4)


@pytest.mark.parametrize("make", DISTANCES)
def test_distance_is_zero_with_finite_gradient_at_a_perfect_reconstruction(make):
    x, _ = pair()
    recon = x.clone().requires_grad_(True)
    value = make()(x, recon)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert recon.grad.isfinite().all()


@pytest.mark.parametrize("make", [*DISTANCES, Charbonnier, LearnedVariance])
def test_distance_has_a_gradient_outside_the_data_range(make):
    x, _ = pair()
    recon = (x + 5 + 0.1 * torch.rand_like(x)).requires_grad_(True)  # a clamp to [0, 1] has none
    make()(x, recon).backward()
    assert (recon.grad != 0).float().mean() > 0.5


@pytest.mark.parametrize("make", [*DISTANCES, Charbonnier, LearnedVariance])
def test_distance_of_a_batch_is_the_mean_of_its_samples(make):
    x, recon = pair((3, 2, 16, 12, 14))
    each = [make()(x[i : i + 1], recon[i : i + 1]) for i in range(3)]
    assert make()(x, recon).item() == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)


@pytest.mark.parametrize("make", [*DISTANCES, Charbonnier])
def test_distance_falls_as_the_noise_does(make):
    x, _ = pair()
    noise = torch.randn_like(x)
    values = [make()(x, x + amount * noise).item() for amount in (0.05, 0.1, 0.2, 0.4)]
    assert values == sorted(values)


def test_wrong_options_of_terms_are_one_line_errors():
    x, recon = pair((1, 1, 8, 12, 12))
    for wrong, key in [
        (lambda: SSIM()(x, recon), "SSIM.window 11"),
        (lambda: SSIM(window=4), "SSIM.window is 4"),
        (lambda: L1(weight=-1), "weight of L1 is -1"),
        (lambda: L1(weight=math.nan), "weight of L1 is nan"),
        (lambda: LearnedVariance(channels=3)(*pair((1, 2, 8, 8))), "LearnedVariance.channels is 3"),
        (lambda: KL(target_std=0.0), "KL.target_std is 0.0"),
    ]:
        with pytest.raises(ValueError, match=key) as caught:
            wrong()
        assert "\n" not in str(caught.value)


def test_learned_variance_settles_at_the_mean_distance_of_each_channel():
    x = torch.zeros(4, 2, 8, 8)
    recon = torch.stack((torch.full((4, 8, 8), 0.5), torch.full((4, 8, 8), 0.02)), dim=1)
    term = LearnedVariance(channels=2)
    optimizer = torch.optim.Adam(term.parameters(), lr=0.2)
    for _ in range(100):
        optimizer.zero_grad()
        term(x, recon).backward()
        optimizer.step()
    assert term.logvar.exp().tolist() == pytest.approx([0.5, 0.02], rel=0.02)


# KL


def test_kl_equals_the_divergence_of_torch_distributions():
    posterior = posterior_of()
    normal = torch.distributions.Normal(posterior.mean, (posterior.logvar / 2).exp())
    wanted = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).mean()
    assert KL()(None, None, posterior).item() == pytest.approx(wanted.item(), rel=1e-5)
    assert posterior.kl().item() == pytest.approx(wanted.item(), rel=1e-5)


def test_kl_grows_without_bound_as_sigma_falls():
    mean = torch.zeros(1, 2, 4, 4, 4)
    values = [KL()(None, None, DiagonalGaussian(mean, mean + lv)).item() for lv in (0, -5, -20)]
    assert values[0] == pytest.approx(0)
    assert values[1] == pytest.approx(0.5 * (math.exp(-5) + 5 - 1), rel=1e-5)
    assert values[2] > 9  # sigma taken for a log-variance would stay below 0.5


@pytest.mark.parametrize("dims", [2, 3])
def test_kl_does_not_change_with_the_patch_size_nor_does_its_gradient_balance(dims):
    small = posterior_of((2, 4, 4, 3, 5)[: 2 + dims])
    tile = (1, 1, *(2,) * dims)
    large = DiagonalGaussian(small.mean.repeat(tile), small.logvar.repeat(tile))
    assert KL()(None, None, large).item() == pytest.approx(KL()(None, None, small).item(), rel=1e-5)
    per_sample = small.mean[0].numel()
    assert small.kl("sum").item() == pytest.approx(small.kl().item() * per_sample, rel=1e-5)


def test_kl_warm_up_rises_linearly_to_the_weight():
    kl = KL(weight=0.5, warmup_steps=4)
    assert [float(kl.weight_at(s)) for s in range(6)] == pytest.approx(
        [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    )


def test_free_bits_leave_cheap_channels_without_gradient():
    mean = torch.zeros(2, 2, 4, 4, 4)
    mean[:, 1] = 2.0  # 2 nats an element; channel 0 has none
    mean.requires_grad_(True)
    kl = KL(free_bits=0.5)
    value = kl(None, None, DiagonalGaussian(mean, torch.zeros_like(mean)))
    value.backward()
    assert value.item() == pytest.approx((0.5 + 2.0) / 2)
    assert kl.scalars["nats"].item() == pytest.approx(1.0)
    assert (mean.grad[:, 0] == 0).all() and (mean.grad[:, 1] != 0).all()


def test_kl_of_half_precision_latents_is_taken_in_float32():
    wide = DiagonalGaussian(torch.full((1, 2, 4, 4, 4), 300.0), torch.full((1, 2, 4, 4, 4), 12.0))
    half = DiagonalGaussian(wide.mean.half(), wide.logvar.half())  # 300^2 and e^12 overflow fp16
    assert KL()(None, None, half).item() == pytest.approx(KL()(None, None, wide).item(), rel=1e-3)


def test_controller_steers_the_latents_to_unit_deviation():
    # Two channels of latents that want to be wide: data of deviation 1, decoded by z * gain.
    torch.manual_seed(0)
    scale = torch.full((2,), 3.0, requires_grad=True)
    logvar = torch.full((2,), -3.0, requires_grad=True)
    kl = KL(weight=1e-4, target_std=1.0, target_rate=0.04)
    optimizer = torch.optim.Adam([scale, logvar], lr=0.04)
    deviations = []
    for step in range(1200):
        x = torch.randn(8, 2, 4, 4)
        mean = x * scale.view(2, 1, 1)
        posterior = DiagonalGaussian(mean, logvar.view(2, 1, 1).expand_as(mean))
        # Recovering x = z / scale costs var / scale^2: without KL, scale runs away.
        recon = (posterior.logvar.exp() / scale.view(2, 1, 1) ** 2).mean()
        loss = recon + kl.weight_at(step) * kl(None, None, posterior, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kl.after_step()
        deviations.append(kl.scalars["std"].item())
    assert deviations[0] > 2.5
    assert np.mean(deviations[-100:]) == pytest.approx(1.0, abs=0.05)
    assert kl.dead_channels() == []


def test_dead_channels_are_reported_and_lower_the_weight_when_all_are_dead():
    mean = torch.randn(4, 3, 4, 4, 4)
    mean[:, 1] = 0.0
    kl = KL(target_std=1.0)
    kl(None, None, DiagonalGaussian(mean, torch.full_like(mean, -4.0)))
    assert kl.scalars["dead_channels"].item() == 1
    kl.after_step()
    assert kl.dead_channels() == [1]
    kl(None, None, DiagonalGaussian(torch.zeros_like(mean), torch.zeros_like(mean)))
    before = kl.factor.item()
    kl.after_step()
    assert kl.dead_channels() == [0, 1, 2]
    assert kl.factor.item() < before


def test_controller_ignores_validation_and_non_finite_latents():
    kl = KL(target_std=1.0)
    wide = posterior_of(std=5.0)
    with torch.no_grad():
        kl(None, None, wide)
    kl.after_step()
    assert kl.factor.item() == 1.0
    kl(None, None, DiagonalGaussian(wide.mean * math.inf, wide.logvar))
    kl.after_step()
    assert kl.factor.item() == 1.0
    kl(None, None, wide)
    kl.after_step()
    assert kl.factor.item() > 1.0


def test_controller_sees_micro_batches_as_one_batch_and_its_state_resumes():
    latents = [posterior_of(std=3.0) for _ in range(4)]
    whole = DiagonalGaussian(
        torch.cat([p.mean for p in latents]), torch.cat([p.logvar for p in latents])
    )
    one, many = (KL(target_std=1.0, target_rate=0.1) for _ in range(2))
    for step in range(3):
        one(None, None, whole, step)
        one.after_step()
        if step == 2:  # a resumed run
            state, many = many.state_dict(), KL(target_std=1.0, target_rate=0.1)
            many.load_state_dict(state)
        for micro in latents:
            many(None, None, micro, step)
        many.after_step()
    assert many.factor.item() == pytest.approx(one.factor.item(), rel=1e-5)
    assert one.factor.item() > 1.2


# The sum


class Brightness(Term):
    """Difference of the mean intensities; a term as a user would write it.

    Args:
        weight: Factor of the term in the total.
        power: Exponent of the difference.
    """

    def __init__(self, weight: float = 1.0, power: float = 2.0):
        super().__init__(weight)
        self.power = power

    def forward(self, x, recon, posterior, step):
        """Return the difference, mean over samples."""
        return (x - recon).flatten(1).mean(1).abs().pow(self.power).mean()


def test_total_is_the_weighted_sum_of_the_named_terms():
    x, recon = pair()
    loss = VAELoss(
        recon=partial(L2, weight=2.0),
        kl=partial(KL, weight=0.3),
        extra=[partial(SSIM, weight=0.5), partial(Brightness, weight=7.0)],
    )
    terms = loss(x, recon, posterior_of(), step=0)
    assert {"recon", "kl", "ssim", "brightness", "loss"} <= terms.keys()
    wanted = 2 * terms["recon"] + 0.3 * terms["kl"] + 0.5 * terms["ssim"] + 7 * terms["brightness"]
    assert terms["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert all(value.ndim == 0 for value in terms.values())


def test_only_the_total_keeps_a_graph():
    x, recon = pair()
    terms = VAELoss(recon=LearnedVariance)(x, recon.requires_grad_(True), posterior_of(), step=0)
    assert [name for name, value in terms.items() if value.requires_grad] == ["loss"]


def test_loss_alone_gives_every_encoder_parameter_a_gradient():
    vae = tiny_vae()
    x = torch.rand(2, 1, 16, 12, 20)
    recon, posterior = vae(x)
    VAELoss(kl=partial(KL, weight=0.0))(x, recon, posterior, step=0)["loss"].backward()
    assert [n for n, p in vae.encoder.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_formulas_stay_in_float32_under_autocast():
    x, recon = pair()
    posterior = posterior_of()
    loss = VAELoss(recon=Charbonnier, extra=[SSIM, FocalFrequency, GradientDifference])
    exact = loss(x, recon, posterior, step=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = loss(x, recon, posterior, step=0)
    assert {n: v.item() for n, v in mixed.items()} == {n: v.item() for n, v in exact.items()}
    low = loss(x.bfloat16(), recon.bfloat16(), posterior, step=0)
    assert low["loss"].dtype == torch.float32
    assert low["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.05)


def test_generator_parameters_are_the_learned_ones_and_not_the_discriminator():
    loss = VAELoss(recon=partial(LearnedVariance, channels=2), adversarial=Adversarial)
    assert [p.shape for p in loss.generator_parameters()] == [(2,)]
    assert VAELoss().generator_parameters() == []
    assert VAELoss().discriminator is None and not VAELoss().discriminator_active(10)


def test_two_terms_with_one_name_are_refused():
    with pytest.raises(ValueError, match="'ssim' is taken"):
        VAELoss(extra=[SSIM, SSIM])


def test_learned_variance_divides_the_perceptual_term_too():
    x, recon = pair()
    make = partial(Brightness, weight=0.5)
    loss = VAELoss(
        recon=partial(LearnedVariance, logvar_init=-2.0),
        kl=partial(KL, weight=0.0),
        perceptual=make,
    )
    terms = loss(x, recon, posterior_of(), step=0)
    wanted = terms["recon"] + math.exp(2.0) * 0.5 * terms["perceptual"]
    assert terms["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)


def build_from_yaml(tmp_path, text):
    def train(loss: Callable[[], VAELoss] = VAELoss):
        """Train.

        Args:
            loss: The loss.
        """

    path = tmp_path / "run.yaml"
    path.write_text(text)
    return parse(train, ["--config", str(path)])["loss"]()


def test_yaml_names_terms_by_class_and_adds_a_users_own(tmp_path):
    loss = build_from_yaml(
        tmp_path,
        f"""
loss:
  class_path: vae3d.losses.vae_loss.VAELoss
  init_args:
    recon: {{class_path: vae3d.losses.reconstruction.Charbonnier, init_args: {{eps: 1e-2}}}}
    kl: {{class_path: vae3d.losses.kl.KL, init_args: {{weight: 1e-3, target_std: 1.0}}}}
    adversarial:
      class_path: vae3d.losses.adversarial.Adversarial
      init_args:
        criterion: least_squares
        start_step: 100
        discriminator:
          class_path: vae3d.losses.adversarial.PatchDiscriminator
          init_args: {{channels: 8, num_layers: 2}}
    extra:
    - {{class_path: vae3d.losses.reconstruction.SSIM, init_args: {{weight: 0.1}}}}
    - {{class_path: {__name__}.Brightness, init_args: {{power: 1.0}}}}
""",
    )
    assert loss.terms["recon"].eps == 0.01
    assert float(loss.terms["kl"].weight_at(0)) == pytest.approx(1e-3)
    assert loss.terms["ssim"].weight == 0.1 and loss.terms["brightness"].power == 1.0
    assert isinstance(loss.discriminator.net, PatchDiscriminator)
    assert loss.discriminator_active(100) and not loss.discriminator_active(99)


def test_yaml_may_say_the_plain_names_of_the_shipped_classes(tmp_path):
    if find_spec("deepbet") is None:
        pytest.skip("pip install deepbet")
    loss = build_from_yaml(
        tmp_path,
        """
loss:
  class_path: VAELoss
  init_args:
    recon: {class_path: LearnedVariance, init_args: {base: L2}}
    perceptual: {class_path: Perceptual, init_args: {weight: 0.5, network: DeepBet}}
    adversarial: {class_path: Adversarial, init_args: {spatial_dims: 3}}
    extra: [GradientDifference, FocalFrequency]
""",
    )
    assert isinstance(loss.terms["recon"].base, L2)
    assert type(loss.terms["perceptual"].network).__name__ == "DeepBet"
    extra = ["gradient_difference", "focal_frequency"]
    assert [*loss.terms] == ["recon", "kl", "commitment", "perceptual", *extra]


def test_yaml_with_an_unknown_key_names_it(tmp_path):
    with pytest.raises(ValueError, match="wieght"):
        build_from_yaml(
            tmp_path,
            "loss: {class_path: vae3d.losses.vae_loss.VAELoss, init_args: {kl: {class_path: "
            "vae3d.losses.kl.KL, init_args: {wieght: 1}}}}",
        )

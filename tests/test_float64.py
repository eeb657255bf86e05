"""Float64 stays float64 in networks, losses and averages: nothing is rounded on the way."""

from functools import partial

import pytest
import torch
from test_blocks import LAYERS, ids, network
from test_exact import subclasses, tiny, tiny_preset
from test_norm import NORMS
from test_perceptual import Spy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vae3d.losses.adversarial import Adversarial, PatchDiscriminator
from vae3d.losses.commitment import Commitment
from vae3d.losses.kl import KL
from vae3d.losses.perceptual import Perceptual
from vae3d.losses.reconstruction import SSIM, Pointwise
from vae3d.losses.term import Decoding, Disturbance, Term
from vae3d.losses.vae_loss import VAELoss
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.posterior import FSQ, VQ, PosteriorHead, Quantized
from vae3d.training.ema import EMA

SHAPE = {2: (2, 1, 11, 14), 3: (2, 1, 8, 12, 10)}
OPTIONS = {  # of terms that do not come with defaults for tiny volumes
    SSIM: {"window": 5},
    Perceptual: {"network": Spy, "view": "slices", "num_slices": 2},
    KL: {"target_std": 1.0, "free_bits": 0.1},
}
HEADS_OF_CODES = {FSQ: partial(FSQ, (5, 3)), VQ: partial(VQ, 16)}
TERMS = [t for t in subclasses(Term) if t is not Pointwise and t is not Disturbance]


class NoRounding(TorchDispatchMode):
    """Stops at the first operation that makes narrower floating numbers of float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(is_float(value, torch.float64) for value in tree_leaves((args, kwargs))):
            rounded = [v for v in tree_leaves(out) if is_float(v, torch.float32)]
            assert not rounded, f"{func} rounds float64 to float32"
        return out


def is_float(value, dtype):
    return isinstance(value, torch.Tensor) and value.dtype == dtype


def assert_wide(vae, x):
    """Forward and backward of a network in training mode."""
    vae, x = vae.double().train(), x.double().requires_grad_()
    with NoRounding():
        recon, posterior = CustomVAE.forward(vae, x, True)
        loss = recon.square().sum()
        if not isinstance(posterior, Quantized):
            loss = loss + posterior.kl()
        loss.backward()
    assert {t.dtype for t in (recon, posterior.mean, x.grad)} == {torch.float64}


def test_the_check_sees_a_cast_and_back():
    with pytest.raises(AssertionError, match="rounds float64"), NoRounding():
        torch.ones(3, dtype=torch.float64).float().double()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("cls", LAYERS, ids=ids)
def test_every_layer_keeps_float64(cls, dims):
    vae = network(cls, channels=(8, 8), latent_channels=2, spatial_dims=dims)
    assert_wide(vae, torch.rand(SHAPE[dims]))


@pytest.mark.parametrize("norm", NORMS, ids=ids)
def test_every_norm_keeps_float64(norm):
    assert_wide(tiny(norm=norm), torch.rand(SHAPE[3]))


@pytest.mark.parametrize("head", list(subclasses(PosteriorHead)), ids=ids)
def test_every_posterior_and_the_linear_code_keep_float64(head):
    made = HEADS_OF_CODES.get(head, head)
    assert_wide(tiny(posterior=made, linear_code=made is head), torch.rand(SHAPE[3]))


@pytest.mark.parametrize("preset", list(subclasses(CustomVAE)), ids=ids)
def test_every_preset_keeps_float64(preset):
    assert_wide(tiny_preset(preset, 3), torch.rand(SHAPE[3]))


@pytest.mark.parametrize("term", TERMS, ids=ids)
def test_every_term_of_the_loss_keeps_float64(term):
    made = partial(term, **OPTIONS.get(term, {}))
    sockets = {KL: "kl", Perceptual: "perceptual", Commitment: "commitment"}
    options = {sockets[term]: made} if term in sockets else {"extra": (made,)}
    heads = {"posterior": HEADS_OF_CODES[VQ]} if term is Commitment else {}
    assert_wide_loss(VAELoss(**options), **heads)


def test_an_adversarial_loss_keeps_float64_on_both_sides():
    judge = partial(PatchDiscriminator, num_layers=1, channels=8)
    game = partial(Adversarial, discriminator=judge, feature_matching_weight=1.0, r1_weight=1.0)
    assert_wide_loss(VAELoss(adversarial=game))


def assert_wide_loss(loss, **network):
    vae, loss = tiny(**network).double().train(), loss.double()
    x = torch.rand(SHAPE[3], dtype=torch.float64)
    noise = torch.Generator().manual_seed(0)

    def normal(shape, word):
        return torch.randn(2, *shape, generator=noise, dtype=torch.float64)

    with NoRounding():
        posterior = vae.encode(x)
        z = posterior.sample()
        decoded = loss.disturbed(z, normal)
        recon = vae.decode(decoded)
        decoding = Decoding(z, decoded, vae.decode)
        terms = loss(x, recon, posterior, 0, last_layer=vae.last_layer, decoding=decoding)
        terms["loss"].backward()
        if loss.discriminator:
            loss.discriminator_loss(x, recon, 0)["discriminator_loss"].backward()
        loss.after_step()
    assert terms["loss"].dtype == torch.float64


def test_the_average_of_float64_weights_is_float64():
    vae = tiny().double()
    with NoRounding():
        ema = EMA(vae, 0.9)
        ema.update(0)
    assert {t.dtype for t in ema.shadow.values()} == {torch.float64}

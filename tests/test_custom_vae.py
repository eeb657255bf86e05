"""CustomVAE: shapes, factors, gradients, sampling, checkpointing, clear errors."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn

from vae3d.models.attention import Attention, GlobalAttention, LinearAttention, PatchAttention
from vae3d.models.blocks import Block
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import BatchNorm, GroupNorm, NormAct
from vae3d.models.upsample import TransposeUp

TINY = {"channels": (4, 8), "norm": partial(GroupNorm, num_groups=4), "num_res_blocks": 1}
BUSY = TINY | {
    "attention": PatchAttention,
    "attention_levels": (False, True),
    "mid_attention": partial(GlobalAttention, num_heads=2, relative_position_bias=(4, 4, 4)),
}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_any_size_goes_in_and_the_same_comes_out(spatial_dims):
    vae = CustomVAE(spatial_dims=spatial_dims, **TINY)
    for size in [(16, 12, 20), (9, 7, 13), (33, 1, 2), (1, 1, 1)]:
        x = torch.randn(2, 1, *size[:spatial_dims])
        recon, posterior = vae(x)
        assert recon.shape == x.shape
        assert posterior.mean.shape[2:] == tuple((n + 1) // 2 for n in size[:spatial_dims])


def test_sizes_that_divide_are_not_padded():
    vae, x = CustomVAE(**TINY).eval(), torch.randn(1, 1, 8, 4, 6)
    padded = torch.cat([x, x[..., -1:]], -1)
    assert torch.equal(vae.pad(padded)[..., :7], padded)
    assert torch.equal(vae.pad(padded)[..., 7], padded[..., 6])
    assert vae.pad(x) is x


@pytest.mark.parametrize(
    ("factors", "expected"),
    [
        (None, (4, 4, 4)),
        ((1, 2, 4), (8, 8, 8)),
        (((1, 1, 1), (2, 2, 1), (2, 2, 2)), (4, 4, 2)),
        (((2, 2, 1), (1, 1, 1), (3, 1, 2)), (6, 2, 2)),
    ],
)
def test_each_level_shrinks_each_axis_by_its_factor(factors, expected):
    vae = CustomVAE(channels=(4, 4, 4), norm=TINY["norm"], num_res_blocks=1, factors=factors)
    assert vae.factor == expected
    x = torch.randn(1, 1, *(2 * f for f in expected))
    assert vae.encode(x).mean.shape == (1, 4, 2, 2, 2)
    assert vae(x)[0].shape == x.shape


@pytest.mark.parametrize("config", [TINY, BUSY], ids=["tiny", "busy"])
def test_every_parameter_gets_a_gradient_from_the_reconstruction_alone(config):
    vae = CustomVAE(**config)
    recon, _ = vae(torch.randn(2, 1, 8, 12, 16))
    recon.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())


def test_evaluation_takes_the_mean_and_training_samples():
    vae, x = CustomVAE(**TINY), torch.randn(1, 1, 8, 8, 8)
    assert not torch.equal(vae(x)[0], vae(x)[0])
    assert torch.equal(vae(x, sample_posterior=False)[0], vae(x, sample_posterior=False)[0])
    vae.eval()
    assert torch.equal(vae(x)[0], vae(x)[0])
    assert torch.equal(vae(x)[0], vae.decode(vae.encode(x).mean))
    assert not torch.equal(vae(x, sample_posterior=True)[0], vae(x)[0])


@pytest.mark.parametrize("mode", ["block", "level"])
def test_checkpointing_changes_no_bit_with_dropout_attention_and_noise(mode):
    from vae3d.models.blocks import ResBlock

    vae = CustomVAE(**BUSY, block=partial(ResBlock, dropout=0.3))
    x, results = torch.randn(1, 1, 8, 8, 12), []
    for setting in ("none", mode):
        vae.set_checkpointing(setting)
        vae.zero_grad()
        torch.manual_seed(1)
        recon, posterior = vae(x)
        (recon.square().mean() + posterior.kl()).backward()
        results.append([recon, *(p.grad.clone() for p in vae.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    "mode, norm", [("block", BatchNorm), ("level", TINY["norm"])], ids=["block", "level"]
)
def test_a_compiled_model_recomputes_too(mode, norm):
    """With the gradients of the plain one, and running statistics that move once."""
    torch.manual_seed(0)
    plain, x = CustomVAE(**TINY | {"norm": norm}), torch.rand(2, 1, 8, 8, 8)
    vae = copy.deepcopy(plain)
    vae.set_checkpointing(mode)
    for chain in (vae.encoder, vae.decoder):
        chain.compile(backend="aot_eager")
    for model in (plain, vae):
        model(x, sample_posterior=False)[0].square().mean().backward()
    for p, q in zip(plain.parameters(), vae.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)
    for p, q in zip(plain.buffers(), vae.buffers(), strict=True):
        torch.testing.assert_close(p, q)


def test_training_compiles_for_each_size_and_validation_for_none():
    """Inductor's backward pass of a graph for any size fails (`Invalid ranges [0:-1]`)."""
    torch.compiler.reset()
    vae, seen = CustomVAE(**TINY), []
    vae.encoder.compile(backend=lambda graph, inputs: seen.append(inputs) or graph)
    for shape in ((8, 8, 4), (8, 8, 8), (8, 8, 4)):
        vae(torch.rand(1, 1, *shape))
    assert len(seen) == 2
    assert not any(isinstance(x, torch.SymInt) for inputs in seen for x in inputs)
    with torch.no_grad():
        vae(torch.rand(1, 1, 12, 8, 8))
    assert len(seen) == 2


def test_checkpointing_stores_less(monkeypatch):
    vae, x = CustomVAE(**TINY), torch.randn(1, 1, 16, 16, 16)

    def stored(mode):
        vae.set_checkpointing(mode)
        sizes = []
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t, lambda t: t
        )
        with keep:
            vae(x)
        return sum(sizes)

    assert stored("block") < stored("none")
    assert stored("level") < stored("block")
    with pytest.raises(ValueError, match="checkpointing='some' is not one of"):
        vae.set_checkpointing("some")


def test_encoder_and_decoder_are_flat_chains_of_known_layers():
    vae = CustomVAE(**BUSY)
    for half in (vae.encoder, vae.decoder):
        assert isinstance(half, nn.Sequential)
        x = torch.randn(1, 1 if half is vae.encoder else 4, 8, 8, 8)
        by_hand = x
        for layer in half:
            by_hand = layer(by_hand)
        torch.testing.assert_close(half(x), by_hand)
        assert [layer for level in half.levels() for layer in level] == list(half)
        torch.testing.assert_close(half[2:](half[:2](x)), by_hand)
    blocks = [layer for layer in vae.encoder if isinstance(layer, Block)]
    assert all(isinstance(b.body, nn.Sequential) for b in blocks)
    assert isinstance(vae.decoder[-2], NormAct)
    assert vae.last_layer is vae.decoder[-1].weight


def test_attention_stands_where_it_is_asked_for():
    vae = CustomVAE(
        **TINY,
        attention=LinearAttention,
        attention_levels=(True, False),
        mid_attention=GlobalAttention,
    )
    for half in (vae.encoder, vae.decoder):
        found = [type(layer) for layer in half if isinstance(layer, Attention)]
        assert sorted(c.__name__ for c in found) == ["GlobalAttention", "LinearAttention"]
    bare = CustomVAE(**TINY, mid_attention=GlobalAttention, encoder_mid=False)
    assert not any(isinstance(layer, Attention) for layer in bare.encoder)
    assert any(isinstance(layer, Attention) for layer in bare.decoder)


def test_stage_2_latents_are_scaled_means_and_come_back():
    vae = CustomVAE(**TINY, latent_scale=0.5, latent_shift=0.1).eval()
    x = torch.randn(1, 1, 8, 8, 8)
    z = vae.encode_stage_2_inputs(x)
    torch.testing.assert_close(z, (vae.encode(x).mean - 0.1) * 0.5)
    torch.testing.assert_close(vae.decode_stage_2_outputs(z), vae(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("output", "low", "high"), [("tanh", -1, 1), ("sigmoid", 0, 1)])
def test_output_functions_bound_the_reconstruction(output, low, high):
    recon, _ = CustomVAE(**TINY, output=output)(50 * torch.randn(1, 1, 8, 8, 8))
    assert low <= recon.min()
    assert recon.max() <= high


def test_networks_nest_and_report_missing_keys():
    outer = nn.ModuleDict({"vae": CustomVAE(**TINY), "other": nn.Linear(2, 2)})
    state = outer.state_dict()
    assert "vae.encoder.0.weight" in state
    del state["vae.encoder.0.weight"]
    result = outer.load_state_dict(state, strict=False)
    assert result.missing_keys == ["vae.encoder.0.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        outer.load_state_dict(state)


def test_autocast_reconstructs_about_the_same_and_keeps_the_posterior_in_float32():
    vae, x = CustomVAE(**BUSY).eval(), torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        expected = vae(x)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            recon, posterior = vae(x)
    assert posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    assert (recon.float() - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_run(dtype):
    vae = CustomVAE(**TINY).to(dtype).eval()
    recon, _ = vae(torch.randn(1, 1, 8, 8, 8).to(dtype))
    assert recon.isfinite().all()


def trained_to_overflow(dtype):
    """A network whose decoder has activations beyond 65504 and an output of about 1."""
    vae = CustomVAE(**TINY).eval()
    with torch.no_grad():
        vae.decoder[0].weight.mul_(3e5)  # the norms that follow undo it
    reference = copy.deepcopy(vae).double()
    return vae.to(dtype), reference


@pytest.mark.parametrize("autocast", [False, True])
def test_a_float16_decoder_whose_activations_overflow_is_computed_in_float32(autocast):
    vae, reference = trained_to_overflow(torch.float32 if autocast else torch.float16)
    z = torch.randn(1, 4, 4, 6, 5)
    with torch.no_grad(), torch.autocast("cpu", torch.float16, enabled=autocast):
        assert not vae.decoder(vae.post_quant_conv(z.to(vae.last_layer.dtype))).isfinite().all()
        with pytest.warns(UserWarning, match="overflow float16"):
            recon = vae.decode(z)
    assert recon.dtype == torch.float16
    expected = reference.decode(z.double())
    assert (recon - expected).abs().max() < 0.01 * expected.abs().max()


def test_a_float16_encoder_whose_activations_overflow_is_computed_in_float32():
    vae = CustomVAE(**TINY).half().eval()
    x = 6e4 * torch.rand(1, 1, 8, 4, 6).half()
    with torch.no_grad():
        vae.encoder[0].weight.fill_(10)
        with pytest.warns(UserWarning, match="overflow float16"):
            posterior = vae.encode(x)
        expected = copy.deepcopy(vae).float().encode(x.float())
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=2e-3, atol=2e-3)


def test_a_float16_network_in_range_is_run_once():
    vae, calls = CustomVAE(**TINY).half().eval(), []
    vae.decoder.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        vae(torch.rand(1, 1, 8, 4, 6).half())
    assert len(calls) == 1


def test_overfitting_one_volume_drives_the_loss_down_tenfold():
    vae, x = CustomVAE(**TINY | {"channels": (8, 16)}), torch.zeros(1, 1, 8, 8, 8)
    x[..., 2:6, 3:7, 1:5] = 1
    optimizer, losses = torch.optim.Adam(vae.parameters(), lr=1e-2), []
    for _ in range(60):
        recon, posterior = vae(x)
        loss = (recon - x).square().mean() + 1e-4 * posterior.kl()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": (1,)}, "factors has 1 entries for 2 levels"),
        ({"factors": (1, (2, 2))}, "one positive integer or 3"),
        ({"num_res_blocks": (1, 2, 3)}, "num_res_blocks has 3 entries"),
        ({"attention_levels": (False, True)}, "attention names no class"),
        ({"output": "relu"}, "output='relu' is not one of none, tanh, sigmoid"),
        ({"quant_conv": False, "z_channels": 3}, "quant_conv=False needs"),
        ({"norm": GroupNorm}, "num_groups=32 does not divide 4"),
        ({"mid_attention": partial(GlobalAttention, num_heads=3)}, "num_heads=3 does not divide 8"),
        ({"up": partial(TransposeUp, kernel=1)}, "leaves holes"),
    ],
)
def test_mistakes_are_told_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        CustomVAE(**TINY | options)
    assert "\n" not in str(error.value)


def test_a_volume_of_the_wrong_rank_or_channels_is_told():
    vae = CustomVAE(**TINY)
    with pytest.raises(ValueError, match=r"\(B, 1, X, Y, Z\)"):
        vae(torch.randn(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\(B, 1, X, Y, Z\)"):
        vae(torch.randn(1, 2, 8, 8, 8))


@pytest.mark.parametrize("checkpointing", ["none", "level"])
@pytest.mark.parametrize("norm", [TINY["norm"], BatchNorm], ids=["group", "batch"])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_frozen_half_keeps_weights_and_statistics_and_the_other_its_gradients(
    part, norm, checkpointing
):
    torch.manual_seed(0)
    vae = CustomVAE(**BUSY | {"norm": norm}, linear_code=True)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    vae.set_checkpointing(checkpointing)
    x = torch.rand(2, 1, 8, 4, 12)

    def gradients(network):
        recon, posterior = network(x, sample_posterior=False)
        ((recon - x).square().mean() + posterior.kl()).backward()
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    free = copy.deepcopy(vae).train()
    if norm is BatchNorm:  # what is frozen normalizes by its running statistics
        (free.encoder if part == "encoder" else free.decoder).eval()
    expected = gradients(free)
    vae.freeze(part)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    found = gradients(vae.train())
    mine = {
        "encoder": ("encoder.", "quant_conv.", "head.", "linear_code.analysis."),
        "decoder": ("decoder.", "post_quant_conv.", "linear_code.synthesis."),
    }[part]
    assert found.keys() == {name for name in expected if not name.startswith(mine)} and found
    for name, gradient in found.items():
        assert torch.allclose(gradient, expected[name], rtol=1e-4, atol=1e-6), name
    for name, value in vae.state_dict().items():
        assert not name.startswith(mine) or torch.equal(value, before[name]), name
    assert copy.deepcopy(vae).train().encoder.training == (part != "encoder")

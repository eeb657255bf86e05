"""The diffusion model: MONAI's numbers, the right targets, each sample its own condition."""

import pytest
import torch
from monai.inferers import LatentDiffusionInferer
from monai.networks.nets import DiffusionModelUNet
from monai.networks.schedulers import DDPMScheduler

from vae3d.commands.sample import seconds_to_draw
from vae3d.kernels.progress import passed, watched
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.norm import GroupNorm
from vae3d.models.spec import build
from vae3d.stage2 import DiffusionUNet, create_condition_projector
from vae3d.stage2.diffusion import SOLVERS, LatentDiffusion, positions_of, tokens_of
from vae3d.stage2.latents import Statistics

UNET = {
    "channels": [8, 16],
    "attention_levels": [False, True],
    "num_head_channels": [0, 8],
    "norm_num_groups": 4,
    "num_res_blocks": 1,
}
PROCESSES = [("flow", "v"), ("ddpm", "epsilon"), ("ddpm", "v"), ("ddpm", "sample")]


def config(dims=3, **changes):
    size = {"spatial_dims": dims, "in_channels": 3, "out_channels": 3}
    return {**UNET, **size, "with_conditioning": False, **changes}


def wake(module):
    """Give the layers that start at zero some weight; a fresh UNet predicts nothing but zero."""
    with torch.no_grad():
        for p in module.parameters():
            if not p.any():
                p.normal_(std=0.2)
    return module.eval()


def model(dims=2, **changes):
    torch.manual_seed(0)
    return wake(LatentDiffusion(3, dims, dict(UNET), **changes))


def statistics(mean, std):
    return Statistics(1, 1, mean, std, std, [0.0] * len(mean), 0.0, 1.0)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("cross_attention_dim", [None, 12])
def test_the_unet_is_monais_weight_for_weight(dims, cross_attention_dim):
    options = config(dims, num_class_embeds=3)
    if cross_attention_dim:
        options |= {"with_conditioning": True, "cross_attention_dim": cross_attention_dim}
    theirs = wake(DiffusionModelUNet(**options))
    ours = DiffusionUNet.from_config(options).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, t = torch.randn(2, 3, *(8, 6, 4)[:dims]), torch.tensor([3, 700])
    context = torch.randn(2, 5, cross_attention_dim) if cross_attention_dim else None
    labels = torch.tensor([0, 2])
    assert torch.equal(ours(x, t, context, labels), theirs(x, t, context, labels))


@pytest.mark.parametrize(("process", "solver"), [("flow", "heun"), ("ddpm", "ddim")])
def test_drawing_tells_each_step_and_what_it_takes_is_known_before(process, solver):
    heard: list[float] = []
    with watched(heard.append):
        model(process=process).sample(torch.randn(1, 3, 4, 4), 5, solver)
    assert heard == pytest.approx([0.2] * 5)

    class Slow:
        drawn = 0

        def draw(self, shape, seed, number, device):
            for _ in range(4):
                Slow.drawn += 1
                clock.append(clock[-1] + 3)
                passed(0.25)

    clock = [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vae3d.commands.sample.time.monotonic", lambda: clock[-1])
        assert seconds_to_draw(Slow(), (3, 4, 4), 0, torch.device("cpu")) == 12
    assert Slow.drawn == 2, "two steps tell"


@pytest.mark.parametrize("dims", [2, 3])
def test_the_unet_takes_any_size(dims):
    unet = wake(DiffusionUNet.from_config(config(dims)))
    x = torch.randn(1, 3, *(7, 5, 3)[:dims])
    assert unet(x, torch.tensor([5])).shape == x.shape


def test_from_config_has_the_defaults_of_the_field():
    unet = DiffusionUNet.from_config(
        {"spatial_dims": 2, "in_channels": 4, "out_channels": 4, "channels": [32, 64],
         "attention_levels": [False, True], "num_head_channels": [0, 32]}
    )  # fmt: skip
    assert unet.with_conditioning and unet.context_dim == 512
    z, t = torch.randn(1, 4, 8, 8), torch.tensor([5])
    projector = create_condition_projector(condition_input_dim=4, cross_attention_dim=512)
    context = projector(tokens_of(torch.randn(1, 4, 4, 4)))
    assert unet(z, timesteps=t, context=context).shape == z.shape
    assert unet(z, timesteps=t).shape == z.shape


@pytest.mark.parametrize(
    ("change", "said"),
    [({"channels": None}, "channels"), ({"depth": 3}, "depth"), ({"norm_num_groups": 5}, "num_g")],
)
def test_a_wrong_unet_configuration_is_one_line_that_names_the_key(change, said):
    options = {k: v for k, v in config(**change).items() if v is not None}
    with pytest.raises(ValueError, match=said):
        DiffusionUNet.from_config(options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(num_head_channels=(4, 0)), "is 0 at level 2: give a divisor of its 8 channels"),
        (dict(attention_levels=(False, False), num_head_channels=(0, 0)),
         "level 2, below which the middle block attends"),
        (dict(num_head_channels=(4,)), "must be of one length"),
        (dict(num_head_channels=16), "is 16 at level"),
        (dict(norm_num_groups=0), "do not divide each other"),
    ],
)  # fmt: skip
def test_divisions_that_fail_in_monai_are_one_line_that_names_the_option(change, said):
    options = config() | {"channels": (4, 8), "attention_levels": (False, True)}
    options |= {"num_head_channels": (0, 4), "norm_num_groups": 4}
    DiffusionUNet.from_config(options)
    with pytest.raises(ValueError, match=said) as error:
        DiffusionUNet.from_config(options | change)
    assert "\n" not in str(error.value)


def test_heads_of_a_level_that_does_not_attend_are_not_looked_at():
    options = config() | {"channels": (4, 8), "attention_levels": (False, False)}
    DiffusionUNet.from_config(options | {"num_head_channels": (0, 4), "norm_num_groups": 4})


def test_tokens_are_the_voxels_in_storage_order():
    latent = torch.arange(2 * 3 * 4 * 5 * 6).reshape(2, 3, 4, 5, 6)
    tokens = tokens_of(latent)
    assert tokens.shape == (2, 120, 3)
    assert torch.equal(tokens[1, 7], latent[1, :, 0, 1, 1])
    seed = latent.permute(0, 2, 3, 4, 1).reshape(2, 120, 3)  # as the field writes it
    assert torch.equal(tokens, seed)


def test_every_token_has_its_own_position():
    code = positions_of((5, 4, 3), 32)
    assert code.shape == (60, 32)
    assert torch.cdist(code, code).add(torch.eye(60) * 9).min() > 0.1


@pytest.mark.parametrize(("process", "prediction"), PROCESSES)
def test_the_loss_has_the_target_of_its_prediction(process, prediction):
    """A UNet that knows z and noise must reach a loss of 0 with the paper's formula."""
    m = model(process=process, prediction=prediction)
    z, noise, time = torch.randn(4, 3, 6, 6), torch.randn(4, 3, 6, 6), torch.rand(4)

    def knows(x, timesteps, context=None, class_labels=None):
        if process == "flow":
            t = (timesteps / 1000)[:, None, None, None]
            assert torch.allclose(x, (1 - t) * z + t * noise, atol=1e-6)
            return z - noise
        betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
        alpha = torch.cumprod(1 - betas, 0)[timesteps].float()[:, None, None, None]
        assert torch.allclose(x, alpha.sqrt() * z + (1 - alpha).sqrt() * noise, atol=1e-4)
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * z
        return {"epsilon": noise, "sample": z, "v": v}[prediction]

    m.unet.forward = knows
    assert m.loss(z, noise, time) < 1e-8
    m.unet.forward = lambda *args, **kwargs: torch.zeros_like(z)
    assert m.loss(z, noise, time) > 0.3


@pytest.mark.parametrize(("process", "prediction"), PROCESSES)
@pytest.mark.parametrize("place", [0, 1])
def test_every_solver_finds_data_that_the_network_knows(process, prediction, place):
    """With the exact prediction for one single datum, sampling must return it from any noise."""
    m = model(process=process, prediction=prediction, num_train_timesteps=100)
    solver, datum = SOLVERS[process][place], 3 * torch.randn(1, 3, 4, 4)
    alphas = m.scheduler[0].alphas_cumprod if process == "ddpm" else None

    def knows(x, timesteps, context=None, class_labels=None):
        if process == "flow":  # x = (1 - t) datum + t noise
            return (datum - x) / (timesteps / 100)[:, None, None, None].clamp(min=1e-6)
        alpha = alphas[timesteps.long()][:, None, None, None]
        noise = (x - alpha.sqrt() * datum) / (1 - alpha).sqrt()
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * datum
        return {"epsilon": noise, "sample": datum.expand_as(x), "v": v}[prediction]

    m.unet.forward = knows
    steps = 100 if solver == "ddpm" else 10
    found = m.sample(torch.randn(2, 3, 4, 4), steps, solver)
    assert (found - datum).abs().max() < 1e-3, "latents beyond [-1, 1] must not be clipped"


@pytest.mark.parametrize(("process", "prediction"), PROCESSES)
@pytest.mark.parametrize("place", [0, 1])
def test_samples_are_drawn_under_autocast_too(process, prediction, place):
    """As pictures are while training in bfloat16: the network alone is in half precision."""
    m = model(process=process, prediction=prediction, num_train_timesteps=20).eval()
    seen, unet = [], m.unet.forward
    m.unet.forward = lambda *args, **kwargs: seen.append(unet(*args, **kwargs)) or seen[-1]
    samples = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            samples.append(m.sample(torch.randn(2, 3, 4, 4), 10, SOLVERS[process][place]))
    assert {out.dtype for out in seen} == {torch.float32, torch.bfloat16}
    assert samples[1].dtype == torch.float32
    assert (samples[1] - samples[0]).norm() < 0.1 * samples[0].norm()


def test_heun_is_of_second_order():
    """On a velocity field with a known path, halving the step divides the error by about four."""
    m = model(num_train_timesteps=1000)
    m.unet.forward = lambda x, timesteps, context=None, class_labels=None: (
        x * ((timesteps / 1000)[:, None, None, None])
    )
    truth = torch.exp(torch.tensor(0.5))  # dx/ds = x t over t from 1 to 0
    errors = {}
    for solver, steps in (("euler", 10), ("heun", 10), ("heun", 20)):
        x = m.sample(torch.ones(1, 3, 4, 4), steps, solver).mean()
        errors[solver, steps] = float((x - truth).abs())
    assert errors["heun", 10] < errors["euler", 10] / 5
    assert errors["heun", 20] < errors["heun", 10] / 2.5


def test_latents_are_standardized_inside_and_restored_on_the_way_out():
    m = model()
    m.set_statistics(statistics([5.0, -7.0, 0.0], [0.1, 30.0, 2.0]))
    seen = []

    def spy(x, timesteps, context=None, class_labels=None):
        seen.append(x)
        return torch.zeros_like(x)

    m.unet.forward = spy
    mean = torch.tensor([5.0, -7.0, 0.0])[None, :, None, None]
    std = torch.tensor([0.1, 30.0, 2.0])[None, :, None, None]
    unit = torch.randn(2, 3, 6, 6)
    m.loss(unit * std + mean, torch.zeros_like(unit), torch.zeros(2))
    assert torch.allclose(seen[0], unit, atol=1e-4)
    still = m.sample(unit, 2)  # no velocity: the noise itself, in the latents' own scale
    assert torch.allclose(still, unit * std + mean, atol=1e-4)


def test_each_sample_of_a_batch_attends_to_its_own_condition():
    """The known failure: `condition[0:1]` for the whole batch."""
    m = model(condition_channels=2, cross_attention_dim=24)
    z, condition = torch.randn(1, 3, 6, 6).expand(3, -1, -1, -1), torch.randn(3, 2, 4, 4)
    t = torch.tensor([500])
    together = m._guided(z, t, label=None, condition=condition, guidance=1.0)
    for i in range(3):
        alone = m._guided(z[:1], t, label=None, condition=condition[i : i + 1], guidance=1.0)
        assert torch.allclose(together[i], alone[0], atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_each_sample_of_a_batch_has_its_own_label():
    m = model(classes=("a", "b"))
    z, t = torch.randn(1, 3, 6, 6).expand(2, -1, -1, -1), torch.tensor([500])
    out = m._guided(z, t, label=torch.tensor([0, 1]), condition=None, guidance=1.0)
    assert (out[0] - out[1]).abs().max() > 1e-3
    assert m.class_index("b") == 1 and m.class_index(None) == 2
    with pytest.raises(ValueError, match="'c' is unknown"):
        m.class_index("c")


def test_dropped_samples_see_neither_label_nor_condition():
    m = model(classes=("a", "b"), condition_channels=2, cross_attention_dim=24)
    z, noise, time = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6), torch.tensor([0.5, 0.5])
    drop = torch.tensor([False, False])
    one = m.loss(z, noise, time, drop, torch.tensor([0, 1]), torch.randn(2, 2, 4, 4))
    two = m.loss(z, noise, time, drop, torch.tensor([1, 0]), torch.randn(2, 2, 4, 4))
    none = m.loss(z, noise, time)
    assert torch.allclose(one, two) and torch.allclose(one, none, atol=1e-5)


def test_guidance_moves_from_the_unconditional_prediction_through_the_conditional_one():
    m = model(classes=("a", "b"))
    z, t, label = torch.randn(1, 3, 6, 6), torch.tensor([500]), torch.tensor([0])
    at = {
        g: m._guided(z, t, label=label, condition=None, guidance=g) for g in (0.0, 1.0, 3.0)
    }  # fmt: skip
    without = m._guided(z, t, label=None, condition=None, guidance=1.0)
    assert torch.allclose(at[0.0], without, atol=1e-5)
    assert torch.allclose(at[3.0], without + 3 * (at[1.0] - without), atol=1e-4)


@pytest.mark.parametrize("keep", [[True, True], [False, False]])
def test_every_parameter_has_a_gradient_whatever_is_dropped(keep):
    """Else DDP would wait for gradients that never come. The projector and the null token count."""
    m = model(classes=("a", "b"), condition_channels=2, cross_attention_dim=24)
    z = torch.randn(2, 3, 6, 6)
    loss = m.loss(z, torch.randn_like(z), torch.rand(2), torch.tensor(keep), torch.tensor([0, 1]),
                  torch.randn(2, 2, 4, 4))  # fmt: skip
    loss.backward()
    lacking = [name for name, p in m.named_parameters() if p.grad is None]
    assert not lacking
    used = {name for name, p in m.named_parameters() if p.grad.any()}
    assert ("projector.weight" in used) == keep[0] and ("null_token" in used) != keep[0]


def test_the_model_is_rebuilt_from_its_recipe_with_projector_and_statistics():
    m = model(process="ddpm", classes=("a", "b"), condition_channels=2, cross_attention_dim=24)
    m.set_statistics(statistics([1.0, 2, 3], [4.0, 5, 6]), statistics([7.0, 8], [9.0, 10]))
    twin = build(m.spec)
    twin.load_state_dict(m.state_dict(), strict=True)
    assert {"projector.weight", "null_token", "condition_std"} <= set(m.state_dict())
    assert twin.classes == ("a", "b") and twin.latent_mean.tolist() == [1, 2, 3]
    z, condition = torch.randn(1, 3, 6, 6), torch.randn(1, 2, 4, 4)
    same = [n.eval().sample(z, 2, condition=condition, label=torch.tensor([1])) for n in (m, twin)]
    assert torch.equal(*same)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"process": "flow", "prediction": "epsilon"}, "flow predicts v"),
     ({"process": "ode"}, "process 'ode'")],
)  # fmt: skip
def test_impossible_processes_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        model(**options)


@pytest.mark.parametrize(
    ("process", "how", "said"),
    [("flow", {"solver": "ddim"}, "euler, heun"), ("ddpm", {"steps": 300}, "must divide 1000"),
     ("ddpm", {"steps": 0}, "between 1 and 1000")],
)  # fmt: skip
def test_impossible_solvers_are_refused(process, how, said):
    with pytest.raises(ValueError, match=said):
        model(process=process).sample(torch.randn(1, 3, 4, 4), **how)


def test_times_are_uniform_or_logit_normal():
    normal = torch.randn(20000)
    uniform = model().time_of(normal)
    assert torch.histc(uniform, 10, 0, 1).div(2000).sub(1).abs().max() < 0.1
    middle = model(time_sampling="logit_normal").time_of(normal)
    assert ((middle > 0.25) & (middle < 0.75)).float().mean() > 0.7


@pytest.mark.parametrize("dims", [2, 3])
def test_a_vae_of_ours_is_ready_for_monais_latent_diffusion_inferer(dims):
    """Train step and sampling through MONAI's own inferer, VAE and UNet ours."""
    from functools import partial

    vae = CustomVAE(
        spatial_dims=dims, channels=(4, 8), num_res_blocks=1, latent_channels=3,
        norm=partial(GroupNorm, num_groups=4), latent_scale=0.5, latent_shift=0.1,
    ).eval()  # fmt: skip
    unet = wake(DiffusionUNet.from_config(config(dims)))
    scheduler = DDPMScheduler(num_train_timesteps=10, clip_sample=False)
    inferer = LatentDiffusionInferer(scheduler, scale_factor=1.0)
    x = torch.rand(2, 1, *(16, 8, 8)[:dims])
    z = vae.encode_stage_2_inputs(x)
    assert torch.allclose(z, (vae.encode(x).mean - 0.1) * 0.5, atol=1e-6)
    prediction = inferer(x, vae, unet, torch.randn_like(z), torch.tensor([1, 5]))
    assert prediction.shape == z.shape
    scheduler.set_timesteps(3)
    sample = inferer.sample(torch.randn_like(z), vae, unet, verbose=False)
    assert sample.shape == x.shape
    assert torch.allclose(vae.decode_stage_2_outputs(z), vae.decode(vae.encode(x).mean), atol=1e-5)


def test_an_ldm_without_monai_says_what_to_install(monkeypatch):
    import importlib
    import sys

    import vae3d.stage2.diffusion as home

    monkeypatch.setitem(sys.modules, "monai.inferers", None)
    monkeypatch.setitem(sys.modules, "monai", None)
    monkeypatch.delitem(sys.modules, home.__name__)
    with pytest.raises(ValueError, match=r"pip install 'vae3d\[ldm\]'"):
        importlib.import_module(home.__name__)

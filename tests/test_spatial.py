"""A volume in slabs on several ranks: the numbers of one process, layer by layer.

One process group for each number of ranks; every case runs inside it.
"""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from test_blocks import LAYERS, ids, network
from test_exact import subclasses, tiny, tiny_preset, trained
from test_norm import NORMS
from test_perceptual import Spy
from toys import SHAPE as SHAPE_OF_TOYS
from toys import ToyBatch, ToyLoader, on_ranks, tiny_vae, toy_trainer

from vae3d.kernels import convolutions, memory, steps, winograd
from vae3d.losses.adversarial import Adversarial, PatchDiscriminator
from vae3d.losses.kl import KL
from vae3d.losses.latents import NoiseRobust, SpectrumMatching, StructuredChannels
from vae3d.losses.perceptual import Perceptual
from vae3d.losses.reconstruction import SSIM, FocalFrequency, GradientDifference, LearnedVariance
from vae3d.losses.vae_loss import VAELoss
from vae3d.models import attention, blocks, downsample, norm, presets, upsample
from vae3d.models.custom_vae import CustomVAE
from vae3d.models.posterior import FSQ, VQ, PosteriorHead
from vae3d.models.reach import reach_of
from vae3d.spatial import network as spatial_network
from vae3d.spatial import slabs
from vae3d.spatial.losses import check_loss
from vae3d.spatial.network import SlabVAE
from vae3d.spatial.slabs import Layout, axis_named, cut, own_part
from vae3d.training.checkpoint import load_checkpoint
from vae3d.training.distributed import Mesh, World
from vae3d.training.slabs import SlabTask
from vae3d.training.task import VAETask

ROWS, PLANE = 13, {2: (11,), 3: (6, 7)}  # seven cells of the factor 2, the last one cut off
OUTPUT = {torch.float32: 1e-5, torch.float64: 1e-10}
GRADIENT = {torch.float32: 2e-5, torch.float64: 1e-10}
TINY = dict(channels=(8, 8), latent_channels=2)


def sockets(dims):
    """A network for each layer, norm, head and preset, by name."""
    for layer in LAYERS:
        yield ids(layer), partial(network, layer, spatial_dims=dims, **TINY)
    for cls in NORMS:
        yield ids(cls), partial(tiny, dims, norm=cls)
    for head in subclasses(PosteriorHead):
        made = {FSQ: partial(FSQ, levels=(4, 5)), VQ: partial(VQ, codebook=8)}.get(head, head)
        yield head.__name__, partial(tiny, dims, posterior=made)
    for preset in subclasses(CustomVAE):
        if preset is not presets.T1LightVAE:  # of a fixed size; MaisiVAE has the same layers
            yield preset.__name__, partial(tiny_preset, preset, dims)


def options(dims):
    """Networks that go other ways: factors per axis, three levels, what is computed again."""
    yield "factor 4", partial(tiny, dims, factors=(1, (4,) * dims))
    yield "factor 1 along x", partial(tiny, dims, factors=(1, (1, *(2,) * (dims - 1))))
    yield "linear code", partial(tiny, dims, linear_code=True)
    yield "elu, no quant_conv", partial(tiny, dims, act="elu", quant_conv=False, output="tanh")
    for mode in ("block", "level"):
        yield f"checkpointing {mode}", partial(checkpointed, mode, dims)
    shifted = partial(attention.PatchAttention, window=3, shift=True, relative_position_bias=True)
    biased = partial(attention.GlobalAttention, num_heads=2, relative_position_bias=(3,) * dims)
    yield "global attention with a bias", partial(tiny, dims, mid_attention=biased)
    every = dict(attention=shifted, attention_levels=(True, True))
    yield "windows at every level", partial(tiny, dims, **every)
    yield "wide kernels", partial(tiny, dims, block=partial(blocks.ConvNeXtBlock, kernel=9))
    yield "evaluation", partial(evaluated, dims)


def evaluated(dims):
    """Statistics of norms are then those that training has gathered."""
    return tiny(dims, norm=norm.BatchNorm)


def checkpointed(mode, dims):
    vae = tiny(dims, mid_attention=attention.GlobalAttention, norm=norm.BatchNorm)
    vae.set_checkpointing(mode)
    return vae


def run(vae, x, weight, whole=None):
    """Outputs, and gradients of their weighted sum, of a volume or of a slab of it."""
    halves = vae if whole is None else SlabVAE(vae, whole)
    x = x.clone().requires_grad_()
    posterior = halves.encode(x)
    recon = halves.crop(halves.decode(posterior.mean), x)
    logvar = torch.nan_to_num(posterior.logvar, neginf=0.0)  # of codes
    loss = (recon * weight).sum() + (posterior.mean**2).sum() + logvar.sin().sum()
    loss.backward()
    return recon.detach(), posterior.mean.detach(), logvar.detach(), x.grad


def of_layers(vae, read):
    """Weight and bias of each layer as one vector: either alone may have a gradient of nothing."""
    found = {}
    for name, parameter in vae.named_parameters():
        found.setdefault(name.rpartition(".")[0], []).append(read(parameter).flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


def shape_of(dims, axis):
    """Voxels of a volume that has its rows along an axis."""
    return (*PLANE[dims][:axis], ROWS, *PLANE[dims][axis:])


def prepared(make, dims, dtype, axis):
    """A network, its input, and what one process makes of them."""
    torch.manual_seed(3)
    vae = trained(make()).train(make.func is not evaluated).to(dtype)
    x = torch.rand(2, 1, *shape_of(dims, axis), dtype=dtype)
    weight = torch.rand_like(x)
    before = {name: buffer.clone() for name, buffer in vae.named_buffers()}
    outputs = run(vae, x, weight)
    gradients = of_layers(vae, lambda p: p.grad)
    buffers = {name: buffer.clone() for name, buffer in vae.named_buffers()}
    for name, buffer in vae.named_buffers():
        buffer.copy_(before[name])
    vae.zero_grad(set_to_none=True)
    return vae, x, weight, outputs, gradients, buffers


def compared(world, cases):
    """The largest differences of each case, on a rank: outputs, gradients, buffers."""
    found = {}
    for name, damage, axis, (vae, x, weight, outputs, gradients, buffers) in cases:
        layout = Layout(x.shape[2:], vae.factor, axis)
        own = layout.slabs[world.rank]
        with damage():
            mine = run(vae, layout.part(x, *own), layout.part(weight, *own), layout)
        error = 0.0
        for whole, slab in zip(outputs, mine, strict=True):
            rows = own if whole.shape == x.shape else layout.owned(slab)[world.rank]
            wanted = layout.part(whole, *rows)
            assert slab.shape == wanted.shape
            scale = max(float(whole.abs().max()), 1.0)
            error = max(error, float((slab - wanted).abs().max()) / scale)
        for parameter in vae.parameters():
            dist.all_reduce(parameter.grad)
        slope = 0.0
        for layer, grad in of_layers(vae, lambda p: p.grad).items():
            wanted = gradients[layer]
            slope = max(slope, float((grad - wanted).norm() / wanted.norm()))
        state = 0.0
        for key, buffer in vae.named_buffers():
            state = max(state, float((buffer - buffers[key]).abs().max()))
        found[name] = (error, slope, state)
    return found


@contextmanager
def as_it_is():
    yield


@contextmanager
def without_a_row(backward):
    """What comes from the rank before lacks its last row, in the forward or the backward pass."""
    whole = slabs.exchange

    def lossy(layout, *args):
        arrived = whole(layout, *args)()
        if (torch._C._current_graph_task_id() >= 0) == backward:
            for rank, rows in arrived.items():
                if rank == layout.rank - 1:
                    last = rows.shape[layout.dim]
                    layout.part(rows, last - 1, last).zero_()
        return lambda: arrived

    slabs.exchange = lossy
    try:
        yield
    finally:
        slabs.exchange = whole


@contextmanager
def with_statistics_of_its_own():
    """Each rank takes its own statistics for everybody's."""
    merged = slabs.merged

    def own(counts, means, m2):
        return means[dist.get_rank()], m2[dist.get_rank()] * counts.sum(0) / counts[0]

    slabs.merged = own
    try:
        yield
    finally:
        slabs.merged = merged


def cases_of(kinds, dims, dtype, turn=0, damage=as_it_is):
    """Each kind cut along one axis: the first along the axis `turn`, the others in turn."""
    cases = []
    for number, (name, make) in enumerate(kinds, turn):
        axis = number % dims
        title = f"{name} {dims}D along {'xyz'[axis]}, {dtype}"
        cases.append((title, damage, axis, prepared(make, dims, dtype, axis)))
    return cases


def results_of(ranks, cases):
    with warnings.catch_warnings(action="ignore"):
        return on_ranks(ranks, compared, cases, timeout_s=600)


def assert_equal(ranks, cases):
    """Every case holds on every rank."""
    dtypes = {name: case[0].last_layer.dtype for name, *_, case in cases}
    faults = []
    for rank, found in enumerate(results_of(ranks, cases)):
        for name, (error, slope, state) in found.items():
            dtype = dtypes[name]
            if not (error <= OUTPUT[dtype] and slope <= GRADIENT[dtype] and state <= OUTPUT[dtype]):
                faults.append(f"{name}, rank {rank}: {error:.1e}, {slope:.1e}, {state:.1e}")
    assert not faults, "\n".join(faults)


@pytest.mark.slow
def test_two_ranks_compute_every_layer_as_one_process_does():
    assert_equal(2, cases_of(sockets(2), 2, torch.float64))


def test_three_ranks_compute_in_float32_what_one_process_does(monkeypatch):
    """In fast steps whose slabs are a few rows, by every way to convolve."""
    monkeypatch.setattr(steps, "SLAB_BYTES", 1 << 10)
    monkeypatch.setattr(convolutions, "SLOW_KERNEL", 0)
    monkeypatch.setattr(winograd, "PAYS_FROM", 8)
    monkeypatch.setattr(memory, "OWN_PAGES_FROM", 1 << 12)
    assert_equal(3, cases_of(options(3), 3, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_any_number_of_ranks_computes_what_one_process_does(ranks):
    """Every layer in 3D along every axis, since each number of ranks begins with another."""
    cases = []
    for dims, dtype in ((2, torch.float32), (3, torch.float64)):
        kinds = [*sockets(dims), *options(dims)]
        if ranks == 4:  # of seven cells: there are no four of the factor 4
            kinds = [(name, make) for name, make in kinds if name != "factor 4"]
        cases += cases_of(kinds, dims, dtype, turn=ranks)
    assert_equal(ranks, cases)


def test_lost_rows_and_statistics_of_one_rank_are_noticed():
    """In fast steps (float32), and in the plain layers."""
    damages = {
        "row": partial(without_a_row, backward=False),
        "row of gradients": partial(without_a_row, backward=True),
        "statistics": with_statistics_of_its_own,
    }
    cases = []
    for name, damage in damages.items():
        for dtype in OUTPUT:
            cases += cases_of([(name, partial(tiny, 2))] * 2, 2, dtype, damage=damage)
    found = results_of(2, cases)
    for name, *_ in cases:
        if "gradients" not in name:
            assert max(rank[name][0] for rank in found) > 1e-3
        assert max(rank[name][1] for rank in found) > 1e-3


def bytes_of(world, vae, axis):
    layout = Layout(shape_of(3, axis), vae.factor, axis)
    x = layout.part(torch.rand(2, 1, *layout.shape), *layout.slabs[world.rank])
    with torch.no_grad():
        SlabVAE(vae, layout).decode(SlabVAE(vae, layout).encode(x).mean)
    forward = layout.bytes_sent
    run(vae, x, x, layout)
    return forward, layout.bytes_sent - 2 * forward


@pytest.mark.parametrize("axis", [0, 2])
def test_ranks_send_as_many_bytes_as_the_documentation_says(axis):
    """Channels times the rows that a layer sees of both neighbors, on the plane of its input; keys.

    Backward, fast steps send rows of their output's gradient, other layers those of their input's.
    """
    vae = tiny(3, mid_attention=attention.GlobalAttention).train()
    fine, coarse = 6 * 8, 3 * 4  # planes, filled up to whole cells
    keys = 2 * 2 * 8 * 7 * coarse  # and values, of both bottlenecks
    encoder = (1 + 2 * 4) * 2 * fine + 4 * 2 * fine + (4 + 8 + 4 * 8 + 8) * 2 * coarse
    decoder = (2 + 4 * 8 + 2 * 8 + 8) * 2 * coarse + (8 + 4 + 4) * 2 * fine
    wanted = 2 * 4 * (3 - 1) * (encoder + decoder + keys)
    found = on_ranks(3, bytes_of, vae, axis)
    assert sum(forward for forward, _ in found) == wanted
    wider, narrower = (8 - 4) + (4 - 8), (4 - 8) + (1 - 4)  # blocks and ends that change channels
    wanted += 2 * 4 * (3 - 1) * (wider * 2 * coarse + narrower * 2 * fine)
    wanted += 2 * 4 * 3 * keys  # their gradients come home, too
    assert sum(backward for _, backward in found) == wanted  # here the input has a gradient


def kept(vae, x, whole=None):
    """Bytes of the tensors that a forward pass keeps for its backward pass, weights apart."""
    found = {p.untyped_storage().data_ptr(): 0 for p in vae.parameters()}

    def note(t):
        found.setdefault(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes())
        return t

    halves = vae if whole is None else SlabVAE(vae, whole)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        recon = halves.decode(halves.encode(x).mean)
    return sum(found.values()), recon


def kept_by(world, vaes, shapes):
    found = []
    for axis, shape in enumerate(shapes):
        layout = Layout(shape, (2, 2, 2), axis)
        x = layout.part(torch.rand(1, 1, *shape), *layout.slabs[world.rank])
        found.append([kept(vae, x, layout)[0] for vae in vaes])
    return found


def test_a_rank_keeps_its_part_of_what_one_process_keeps():
    """The inputs of steps with a row or two beside them, and no copies, whatever the axis."""
    modes = ("none", "block", "level")
    vaes = [tiny(3, channels=(8, 8)).train() for _ in modes]
    for vae, mode in zip(vaes, modes, strict=True):
        vae.set_checkpointing(mode)
    shapes = [(96, 8, 8), (8, 96, 8)]
    alone = [kept(vae, torch.rand(1, 1, *shapes[0]))[0] for vae in vaes]
    assert alone[0] > alone[1] > alone[2]
    for found in on_ranks(3, kept_by, vaes, shapes):
        for mine, whole in zip(chain(*found), alone * 2, strict=True):
            assert whole / 3 <= mine < 1.1 * whole / 3


def test_slabs_are_whole_cells_as_even_as_can_be():
    assert cut([13], [2], 3) == [(0, 4), (4, 8), (8, 13)]
    assert cut([5, 8], [2, 2], 4, axis=1) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert own_part([5, 8], [2, 2], 4, 1, axis=1) == (slice(0, 5), slice(2, 4))


def test_volumes_too_short_for_the_ranks_are_refused_with_the_longest_axis():
    words = "13 rows along y are 4 cells of the factor 4, fewer than the 5 ranks that share them"
    with pytest.raises(ValueError, match=f"{words}; use fewer ranks"):
        cut([8, 13, 4], [4, 4, 4], 5, axis=1)
    with pytest.raises(ValueError, match=f"{words}; --slab_axis z has 10; use"):
        cut([8, 13, 20], [4, 4, 2], 5, axis=1)
    with pytest.raises(ValueError, match="--slab_axis z: the model's axes are x and y"):
        axis_named("z", 2)


class Mean(torch.nn.Module):
    """Sees all of a volume, and says so to nobody."""

    def forward(self, x):
        return x - x.mean()


class Doubled(norm.GroupNorm):
    def normalize(self, x):
        return 2 * super().normalize(x)


def of_mean():
    vae = tiny()
    vae.encoder[1].body.append(Mean())
    return vae


def circular():
    vae = tiny()
    vae.encoder[0].padding_mode = "circular"
    return vae


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (of_mean, "what encoder.1.body.4, a Mean, sees"),
        (partial(tiny, norm=partial(Doubled, num_groups=4)), "norm, a Doubled, sees"),
        (circular, "what encoder.0, a Conv3d, sees"),
        (partial(tiny, block=partial(blocks.ResBlock, dropout=0.1)), "dropout drops values"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name(make, words):
    with pytest.raises(ValueError, match=words):
        spatial_network.check(make().train())


@pytest.mark.parametrize("layer", [*subclasses(downsample.Down), *subclasses(upsample.Up)])
def test_a_layer_sees_what_its_description_says(layer):
    """Rows that the description leaves out have no gradient; those at its edges have one."""
    made = layer(12, (2, 2) if "Haar" in layer.__name__ else (3, 2), 2)
    (reach, _) = reach_of(made, 2)
    x = torch.rand(1, 12, 24, 4, requires_grad=True)
    y = made(x)
    assert y.shape[2] == reach.size(24)
    row = y.shape[2] // 2
    lo, hi = reach.wants(row, row + 1)
    y[:, :, row].square().sum().backward()
    seen = x.grad.abs().amax((0, 1, 3)).nonzero().flatten()
    assert lo <= seen.min() and seen.max() < hi


# Training


def on_meshes(function, mesh, *args):
    ranks = mesh.data * mesh.spatial
    return on_ranks(ranks, partial(function, mesh=mesh), *args, timeout_s=600)


class SlabLoader(ToyLoader):
    """A rank's rows of what one process reads whole, of the samples of its team.

    With a mask of samples very different shares count, of one nothing.
    """

    def __init__(self, world, team, batch_size, axis, masked):
        super().__init__(10, batch_size, world.rank // team.size, world.size // team.size)
        self.part = own_part(SHAPE_OF_TOYS, (2, 2, 2), team.size, team.rank, axis)
        shares = torch.linspace(0, 0.9, 10).view(-1, 1, 1, 1, 1)
        draws = torch.rand(10, 1, *SHAPE_OF_TOYS, generator=torch.Generator().manual_seed(2))
        weights = (draws < shares) * (1 + torch.arange(10) % 3).view(-1, 1, 1, 1, 1)
        self.weights = weights.double() if masked else None

    def stream(self):
        for batch in super().stream():
            weight = None if self.weights is None else self.weights[batch.index][:, :, *self.part]
            image = batch.image[:, :, *self.part]
            yield SlabBatch(image, batch.index, weight, whole=SHAPE_OF_TOYS)


@dataclass
class SlabBatch(ToyBatch):
    mean_weight: float | None = None
    whole: tuple[int, ...] = ()


class Smooth(Spy):
    """Features far from zero: near it their direction is chance, and two equal runs part."""

    def forward(self, x):
        return [torch.sigmoid(self.conv(x))]


SLOW = pytest.mark.slow
CODES = dict(posterior=partial(VQ, codebook=24, ema=0.9, reseed=0.2))


def exact_loss(judged=2, coded=False):
    """Every kind of term. Of three slices one of four ranks has none, nor has it any 3D logits.

    Args:
        judged: 2 for judges of slices, 3 for those of volumes, of latents that are changed before
            they are decoded; 0 for none.
        coded: Whether latents are codes, whose spread nothing steers.
    """
    extra = (partial(SSIM, window=3, weight=0.5), partial(GradientDifference, weight=0.5))
    kl = partial(KL, weight=0.1, target_std=None if coded else 1.0, warmup_steps=4)
    if judged == 3:
        kl, extra = partial(kl, free_bits=0.3), (*extra, NoiseRobust, StructuredChannels)
    if not judged:
        return VAELoss(LearnedVariance, kl, None, None, extra)
    view = "slices" if judged == 2 else "volume"
    network = partial(Smooth, judged)
    perceptual = partial(Perceptual, view=view, network=network, num_slices=3)
    judge = partial(PatchDiscriminator, num_layers=judged - 1, channels=8)
    more = dict(feature_matching_weight=0.5, r1_weight=0.1, r1_every=2, start_step=1)
    game = partial(Adversarial, spatial_dims=judged, discriminator=judge, num_slices=3, **more)
    return VAELoss(LearnedVariance, kl, perceptual, game, extra)


def trained_in_slabs(
    world,
    folder,
    steps,
    state=None,
    amp="off",
    axis=0,
    mesh=None,
    judged=2,
    masked=False,
    **network,
):
    """Losses and weights of a training, whatever the number of ranks; float64 but for AMP."""
    dtype = torch.float64 if amp == "off" else torch.float32
    judged = judged if amp == "off" else 0  # they multiply what half precision has rounded
    vae, loss = tiny_vae(**network).to(dtype), exact_loss(judged, bool(network)).to(dtype)
    mesh = Mesh.of("spatial", mesh, world.size)
    team, batch_size = world.team(mesh.spatial), 4 // mesh.data
    whole = team.size == 1
    task = VAETask(vae, loss, 0) if whole else SlabTask(vae, loss, 0, axis, team.group)
    loader = SlabLoader(world, team, batch_size, axis, masked)
    loader.images = loader.images.to(dtype)
    options = dict(max_steps=steps, grad_accum=2, clip_norm=0.5, lr_schedule="constant", amp=amp)
    trainer = toy_trainer(folder, world, task=task, loader=loader, **options)
    if state is not None:
        trainer.load_state_dict(state)
    assert trainer.fit() == 0
    weights = [*trainer.ema.shadow.values(), *loss.state_dict().values(), *vae.buffers()]
    ours = trainer.tracker
    names = ["loss", "recon", "ssim"]
    names += ["perplexity", "usage"] if vae.head.num_codes else ["kl"]
    names += ["kl_nats"] if judged == 3 and not vae.head.num_codes else []
    names += ["commitment"] if isinstance(vae.head, VQ) else []
    if judged:
        names += ["perceptual", "adversarial", "adversarial_weight", "feature_matching"]
        names += ["discriminator_loss", "logits_fake", "r1"]
    numbers = {name: ours.losses(f"train/{name}") for name in names}
    return numbers, torch.cat([w.flatten().double() for w in weights]), trainer.samples


@pytest.mark.parametrize(
    ("first", "then", "steps", "options"),
    [
        ((Mesh(2, 2), 0), (Mesh(1, 3), 0), 4, {}),  # slabs of 4 and 4 rows, then of 2, 2 and 4
        ((Mesh(1, 4), 2), (Mesh(1, 2), 1), 4, dict(judged=3, masked=True)),  # 2, 4, 2 and 4
        pytest.param((Mesh(1, 4), 2), (Mesh(2, 2), 1), 20, dict(masked=True), marks=SLOW),
        pytest.param((Mesh(2, 2), 2), (Mesh(1, 3), 0), 20, {}, marks=SLOW),
        pytest.param((Mesh(2, 2), 0), (Mesh(1, 4), 2), 20, dict(judged=3), marks=SLOW),
        pytest.param((Mesh(1, 3), 0), (Mesh(1, 2), 2), 6, CODES | dict(judged=3), marks=SLOW),
    ],
)
def test_training_in_slabs_is_training_in_one_process(first, then, steps, options, tmp_path):
    """Accumulation, clipping, EMA, every kind of term, judges of slices and volumes.

    Resumed on another number of ranks, cut along another axis.
    """
    half = steps // 2
    train = partial(trained_in_slabs, **options)
    numbers, weights, samples = train(World(), tmp_path / "alone", steps)

    def slabs(how, *args):
        mesh, axis = how
        return on_meshes(partial(train, axis=axis), mesh, *args)

    begun = slabs(first, tmp_path / "slabs", half)
    state = load_checkpoint(tmp_path / "slabs" / "last.pt")
    resumed = slabs(then, tmp_path / "on", steps, state)
    for found, mine, seen in resumed:
        assert seen == samples
        torch.testing.assert_close(mine, weights, rtol=1e-6, atol=1e-8)
        for name, values in found.items():
            values = begun[0][0][name] + values
            torch.testing.assert_close(values, numbers[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_slabs_train_in_half_precision(amp, tmp_path):
    numbers, _, _ = trained_in_slabs(World(), tmp_path / "alone", 2, None, amp)
    for found, _, _ in on_ranks(2, trained_in_slabs, tmp_path / "slabs", 2, None, amp, 1):
        for name, values in found.items():
            torch.testing.assert_close(values, numbers[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"extra": (FocalFrequency,)}, "the loss has FocalFrequency"),
        ({"extra": (SpectrumMatching,)}, "SpectrumMatching"),
    ],
)
def test_what_is_not_taken_over_slabs_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        check_loss(VAELoss(**options))

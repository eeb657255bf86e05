import torch
from torch import nn
from toys import tiny_vae

from vae3d.training.ema import EMA


def test_average_follows_the_formula_with_its_warm_up():
    layer = nn.Linear(3, 2)
    ema = EMA(layer, decay=0.9)
    expected = layer.weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            layer.weight.normal_(generator=torch.Generator().manual_seed(step))
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach()
    torch.testing.assert_close(ema.shadow["weight"], expected)


def test_a_dropped_step_leaves_the_average_untouched_bit_by_bit():
    layer = nn.Linear(3, 2)
    ema = EMA(layer, decay=0.9)
    with torch.no_grad():
        layer.weight.add_(1)
    before = ema.shadow["weight"].clone()
    ema.update(5, skip=torch.tensor(1.0))
    assert torch.equal(ema.shadow["weight"], before)
    ema.update(5, skip=torch.tensor(0.0))
    assert not torch.equal(ema.shadow["weight"], before)


def test_weights_are_lent_and_given_back_even_after_an_error():
    vae = tiny_vae()
    ema = EMA(vae, decay=0.9)
    trained = [p.detach().clone() for p in vae.parameters()]
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(1)
    changed = [p.detach().clone() for p in vae.parameters()]
    try:
        with ema.applied() as network:
            assert network is vae
            assert all(torch.equal(p, q) for p, q in zip(vae.parameters(), trained, strict=True))
            raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(p, q) for p, q in zip(vae.parameters(), changed, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(ema.shadow.values(), trained, strict=True))


def test_state_loads_into_the_network_and_into_another_average():
    vae = tiny_vae()
    ema = EMA(vae, decay=0.5)
    with torch.no_grad():
        for p in vae.parameters():
            p.mul_(2)
    ema.update(100)
    state = ema.state_dict()
    other = tiny_vae(seed=1)
    other.load_state_dict(state)  # strict
    copy = EMA(tiny_vae(seed=2), decay=0.5)
    copy.load_state_dict(state)
    for name, value in copy.shadow.items():
        assert torch.equal(value, state[name])

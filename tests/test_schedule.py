from itertools import pairwise

import pytest

from vae3d.training.schedule import lr_scale

OPTIONS = dict(warmup_steps=10, max_steps=110)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rate_rises_linearly_and_never_starts_at_zero(schedule):
    rise = [lr_scale(step, schedule=schedule, **OPTIONS) for step in range(11)]
    assert rise[0] == pytest.approx(1 / 11)
    assert all(b - a == pytest.approx(1 / 11) for a, b in pairwise(rise))
    assert rise[10] == pytest.approx(1.0)


def test_cosine_is_half_way_down_in_the_middle_and_ends_at_its_floor():
    assert lr_scale(60, schedule="cosine", **OPTIONS) == pytest.approx(0.5)
    assert lr_scale(110, schedule="cosine", **OPTIONS) == pytest.approx(0.0)
    assert lr_scale(110, schedule="cosine", final=0.1, **OPTIONS) == pytest.approx(0.1)
    assert lr_scale(500, schedule="cosine", final=0.1, **OPTIONS) == pytest.approx(0.1)


def test_linear_descends_and_constant_stays():
    assert lr_scale(35, schedule="linear", **OPTIONS) == pytest.approx(0.75)
    assert lr_scale(110, schedule="constant", **OPTIONS) == 1.0


def test_warm_up_longer_than_the_run_is_no_error():
    scale = lr_scale(3, schedule="cosine", warmup_steps=100, max_steps=10)
    assert scale == pytest.approx(4 / 101)

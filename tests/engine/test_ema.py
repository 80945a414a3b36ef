"""The moving average of a network over the steps of a plan."""

import pytest
import torch
from torch import nn
from training import tiny_plan

from mgvideo.engine.ema import ModelEma
from mgvideo.errors import UserError


def test_the_average_is_that_of_the_formula_and_skips_steps() -> None:
    model = nn.Sequential(nn.Conv3d(2, 3, 1), nn.BatchNorm3d(3))
    plan = tiny_plan("baseline", epochs=4)
    ema = ModelEma(model, plan, 0.5)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for step in range(8):
        for name, value in model.state_dict().items():
            value.fill_(step) if name.endswith("tracked") else value.normal_().abs_()
        skip = step == 5
        ema.update(step, torch.tensor(skip))
        decay = min(0.5, (1 + step) / (10 + step))
        if not skip:
            for name, value in model.state_dict().items():
                expected[name] += (1 - decay) * (value.double() - expected[name])
        expected["1.num_batches_tracked"].fill_(step)
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert ema.decay_at(plan.steps - 1) == 0.5


def test_a_step_with_a_larger_batch_counts_as_several() -> None:
    plan = tiny_plan("long", epochs=60, lr_milestones=())
    ema = ModelEma(nn.Linear(2, 2), plan, 0.9)
    steps = [phase.steps[1] - 1 for phase in plan.phases]
    assert [phase.multiplier for phase in plan.phases] == [8, 4, 2, 1]
    assert [ema.decay_at(step) for step in steps] == pytest.approx([0.9**8, 0.9**4, 0.9**2, 0.9])


@pytest.mark.parametrize("decay", [1, -0.1, float("nan")])
def test_an_invalid_decay_is_named(decay: float) -> None:
    with pytest.raises(UserError, match=r"train\.ema="):
        ModelEma(nn.Linear(2, 2), tiny_plan(), decay)

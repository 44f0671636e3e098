"""How a step is executed changes no number: recomputed activations, memory layout, compilation, the caller's own settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from triptych.core.contract import Execution
from triptych.core.recipe import Clip, LossScaling
from triptych.in_pytorch import optim, train

SCALED = LossScaling(initial=8.0, interval=2)


@pytest.mark.parametrize("name", ["resnet50", "resnet20", "mlp"])
@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 4}, {"frozen": True}, {"loss_scaling": SCALED}], ids=str)
def test_remat_changes_no_bit(lab: Any, name: str, changes: dict[str, Any]) -> None:
    frozen = () if not changes.get("frozen") else ("fc1",) if name == "mlp" else ("layer1", "layer2.0.bn1")
    made, plain = (lab.trainer(name, **{**changes, "frozen": frozen, "remat": remat}) for remat in (True, False))
    images, labels = lab.batch(made.model.spec)
    one, other = made.gradients(images, labels), plain.gradients(images, labels)
    assert one.loss == other.loss
    for key, gradient in other.gradients.items():
        np.testing.assert_array_equal(one.gradients[key], gradient)
    assert lab.run(made) == lab.run(plain)
    lab.assert_close(made.state(), plain.state(), 0.0)


def test_remat_draws_the_same_dropout_twice(lab: Any) -> None:
    made, plain = (lab.room.create_trainer(lab.model("mlp", dropout=0.5), lab.recipe(remat=remat)) for remat in (True, False))
    assert lab.run(made) == lab.run(plain)
    lab.assert_close(made.state(), plain.state(), 0.0)


def test_remat_in_half_precision_recomputes_in_half_precision(lab: Any) -> None:
    made, plain = (lab.trainer_in_float32("resnet20", mixed_precision="bfloat16", remat=remat) for remat in (True, False))
    assert lab.run(made) == lab.run(plain)
    lab.assert_close(made.state(), plain.state(), 0.0)


def test_remat_computes_the_inside_of_a_block_twice_and_keeps_interceptions(lab: Any) -> None:
    made = lab.trainer("resnet20", remat=True)
    calls: list[str] = []

    def counted(module: Any, call: Any, x: Any) -> Any:
        calls.append(type(module).__name__)
        return call(x)

    with made.model.intercept("layer2.0", counted), made.model.intercept("layer2.0.bn1", counted), made.model.intercept("bn1", counted):
        lab.run(made, 1)
    assert sorted(calls) == ["BasicBlock"] * 2 + ["BatchNorm2d"] * 3
    assert "forward" not in vars(made.model.layer("layer2.0"))


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 4, "clip": Clip(norm=0.5), "loss_scaling": SCALED, "remat": True}], ids=str)
def test_tuned_is_channels_last_and_changes_rounding_alone(lab: Any, changes: dict[str, Any]) -> None:
    plain = lab.trainer("resnet20", **changes)
    made = lab.room.create_trainer(lab.model("resnet20"), lab.recipe(**changes), Execution(tuned=True))
    images, labels = lab.batch(plain.model.spec)
    layouts: list[bool] = []

    def watch(module: Any, call: Any, x: Any) -> Any:
        layouts.append(x.is_contiguous(memory_format=torch.channels_last))
        return call(x)

    with made.model.intercept("layer2.0.conv1", watch):
        assert made.step(images, labels, 0.1) == pytest.approx(plain.step(images, labels, 0.1), rel=1e-13)
    assert layouts
    assert all(layouts)
    lab.assert_close(made.state(), plain.state(), 1e-10)


def test_compile_changes_rounding_alone(lab: Any) -> None:
    changes = {"loss_scaling": SCALED, "remat": True}
    plain = lab.trainer("mlp", **changes)
    made = lab.room.create_trainer(lab.model("mlp"), lab.recipe(**changes), Execution(compile=True))
    assert lab.run(made) == pytest.approx(lab.run(plain), rel=1e-13)
    lab.assert_close(made.state(), plain.state(), 1e-12)


def test_images_of_any_layout_are_taken_and_left_alone(lab: Any) -> None:
    images, labels = lab.batch(lab.spec("resnet20"))
    frozen = images.copy()
    frozen.setflags(write=False)
    for given in (frozen, images[:, ::-1][:, ::-1], np.asfortranarray(images), images.astype(np.float64)):
        for tuned in (False, True):
            made = lab.room.create_trainer(lab.model("resnet20"), lab.recipe(), Execution(tuned=tuned))
            assert made.step(given, labels, 0.1) == pytest.approx(lab.trainer("resnet20").step(images, labels, 0.1), rel=1e-13)
            np.testing.assert_array_equal(given, frozen)


def test_a_caller_s_low_precision_changes_no_step(lab: Any) -> None:
    plain, made = lab.trainer_in_float32("mlp"), lab.trainer_in_float32("mlp")
    images, labels = lab.batch(plain.model.spec)
    losses, before = lab.run(plain), torch.get_float32_matmul_precision()
    found = plain.gradients(images, labels).gradients
    try:
        torch.set_float32_matmul_precision("medium")
        assert lab.run(made) == losses
        np.testing.assert_array_equal(made.gradients(images, labels).gradients["fc1.weight"], found["fc1.weight"])
    finally:
        torch.set_float32_matmul_precision(before)
    lab.assert_close(made.state(), plain.state(), 0.0)


def test_gradients_of_a_step_before_do_not_count(lab: Any) -> None:
    made, other = lab.trainer("mlp"), lab.trainer("mlp")
    images, labels = lab.batch(made.model.spec)
    for trainer in (made, other):
        trainer.step(images, labels, 0.1)
    for parameter in made.model.native.parameters():
        parameter.grad = torch.full_like(parameter, 1e3)
    assert made.step(images, labels, 0.1) == other.step(images, labels, 0.1)
    lab.assert_close(made.state(), other.state(), 0.0)


def test_what_is_planted_is_looked_up_at_every_call(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = lab.trainer("mlp", clip=Clip(norm=0.1), loss_scaling=SCALED)
    called: list[str] = []
    clip, unscale = optim.clip, train.unscale
    monkeypatch.setattr(optim, "clip", lambda *args: (called.append("clip"), clip(*args)))
    monkeypatch.setattr(train, "unscale", lambda *args: (called.append("unscale"), unscale(*args)))
    lab.run(made, 1)
    assert called == ["unscale", "clip"]


def test_relus_overwrite_their_input_while_a_step_runs_and_nobody_looks(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, right, seen = lab.trainer("resnet20"), train.cross_entropy, []
    relus = [module for module in trainer.model.native.modules() if isinstance(module, torch.nn.ReLU)]

    def cross_entropy(*given: Any) -> Any:
        seen.append({relu.inplace for relu in relus})
        return right(*given)

    monkeypatch.setattr(train, "cross_entropy", cross_entropy)
    lab.run(trainer, 1)
    with trainer.model.intercept("bn1", lambda module, call, x: call(x)):
        lab.run(trainer, 1)
    assert seen == [{True}, {False}]
    assert {relu.inplace for relu in relus} == {False}

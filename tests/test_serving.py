"""Every other way in which training code uses an optimizer, against the dense oracle or the plain loop."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD

from .cases import (
    MSE,
    TwoHeads,
    assert_at,
    flat,
    pinv_step,
    problem,
)


def test_closure():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5, damping=0.0)

    def closure():
        optimizer.zero_grad()
        loss = MSE(model(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        expected, loss = pinv_step(model, x, y, 0.5), MSE(model(x), y)
        assert torch.equal(optimizer.step(closure), loss)
        assert_at(model, expected)


def test_a_closure_that_skips_the_batch_changes_nothing():
    model, _, _ = problem()
    before = flat(model)
    assert AdaptedGD(model).step(lambda: None) is None
    assert torch.equal(flat(model), before)


def test_the_largest_curvature_of_several_outputs_sets_the_unit():
    model, x = TwoHeads().double(), torch.randn(5, 4).double()
    optimizer = AdaptedGD(model, lr=0.1, criterion=MSE)
    out = model(x)
    (MSE(out["first"], torch.zeros(5, 2).double()) + MSE(out["rest"][0], torch.zeros(5, 3, 1).double())).backward()
    optimizer.step()
    assert optimizer.last_step.curvature == pytest.approx(2 / 10)  # of the first; 2/15 of the second


def test_parameter_groups_step_by_their_own_rates():
    model, x, y = problem()
    start = flat(model)
    change = pinv_step(model, x, y, 1.0) - start
    first = sum(p.numel() for p in model[0].parameters())
    rest = [p for layer in model[1:] for p in layer.parameters()]
    optimizer = AdaptedGD(model, params=[{"params": rest, "weight_decay": 0.2}, {"params": model[0].parameters(), "lr": 0.25}])
    MSE(model(x), y).backward()
    optimizer.step()
    expected = torch.cat([(start + 0.25 * change)[:first], (0.8 * start + change)[first:]])
    assert_at(model, expected)


def test_group_alphas():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    optimizer = AdaptedGD(
        model, lr=0.1, params=[{"params": model[0].parameters(), "alpha": 0.0}, {"params": model[2].parameters()}]
    )
    MSE(model(x), y).backward()
    MSE(twin(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight, twin[0].weight - 0.1 * twin[0].weight.grad, rtol=1e-14, atol=0)


def test_frozen_parameters_stay_and_have_no_columns():
    model, x, y = problem()
    model[0].weight.requires_grad_(False)
    frozen = model[0].weight.clone()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert torch.equal(model[0].weight, frozen)
    assert optimizer.last_step.num_params == flat(model).numel()
    assert_at(model, expected)


def test_freezing_and_unfreezing_on_the_way():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    everything = flat(model).numel()
    for trainable in (True, False, True):
        model[0].weight.requires_grad_(trainable)
        expected = pinv_step(model, x, y, 0.5)
        optimizer.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()
        assert optimizer.last_step.num_params == everything - (0 if trainable else 48)
        assert_at(model, expected)


def test_a_parameter_frozen_at_first_can_confirm_calls_later():
    model, x, y = problem()
    for p in model.parameters():
        p.requires_grad_(False)
    optimizer = AdaptedGD(model, lr=0.5, params=model[4].parameters())
    model[4].requires_grad_(True)
    expected = pinv_step(model, x, y, 0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


def test_add_param_group():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5, params=model[0].parameters())
    optimizer.add_param_group({"params": [p for layer in model[1:] for p in layer.parameters()]})
    expected = pinv_step(model, x, y, 0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


def test_named_parameters_as_params():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5, params=model.named_parameters())
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


def test_torch_schedulers():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    for k in range(3):
        expected = pinv_step(model, x, y, 0.5 * 0.1**k)
        optimizer.zero_grad()
        loss = MSE(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        plateau.step(loss.item())
        assert_at(model, expected)


def test_step_hooks_run_and_see_the_optimizer():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt.last_step)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt.last_step.rank)))
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append(("state", len(state["param_groups"]))))
    MSE(model(x), y).backward()
    optimizer.step()
    optimizer.state_dict()
    assert seen == [("pre", None), ("post", 18), ("state", 1)]


def test_a_model_behind_other_parameters():
    """A loss that goes on through another network, stepped by another optimizer."""
    model, x, y = problem()
    encoder = nn.Linear(4, 4).double()
    expected = pinv_step(model, encoder(x).detach(), y, 0.5)
    ours, theirs = AdaptedGD(model, lr=0.5), torch.optim.SGD(encoder.parameters(), lr=0.1)
    before = encoder.weight.clone()
    MSE(model(encoder(x)), y).backward()
    theirs.step()
    ours.step()
    assert_at(model, expected)
    assert not torch.equal(encoder.weight, before)


def test_grad_scaler():
    model, x, y = problem(dtype=torch.float32)
    twin = copy.deepcopy(model)
    ours, plain = AdaptedGD(model, lr=0.5), AdaptedGD(twin, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(MSE(model(x), y)).backward()
    scaler.step(ours)
    scaler.update()
    MSE(twin(x), y).backward()
    plain.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-6, atol=1e-7)
    assert not hasattr(ours, "grad_scale")
    assert ours.last_step.off_output_fraction == 0


def test_grad_scaler_skips_what_overflows_and_goes_on():
    model, x, y = problem(dtype=torch.float32)
    before = flat(model)
    optimizer = AdaptedGD(model, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (scaler.scale(MSE(model(x), y)) * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert optimizer.last_step.status == "skipped"
    assert torch.equal(flat(model), before)
    assert scaler.get_scale() == 512.0
    model.zero_grad()
    scaler.scale(MSE(model(x), y)).backward()
    scaler.step(optimizer)
    assert optimizer.last_step.status == "full_rank"
    assert optimizer.last_step.num_calls == 1


def test_disabled_grad_scaler():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(MSE(model(x), y)).backward()
    scaler.step(optimizer)
    assert_at(model, expected)


def test_two_optimizers_on_parts_of_a_model_are_told_apart():
    model, x, y = problem()
    first, second = (
        AdaptedGD(model, lr=0.1, params=model[0].parameters()),
        AdaptedGD(model, lr=0.1, params=model[2].parameters()),
    )
    MSE(model(x), y).backward()
    first.step()
    with pytest.raises(RuntimeError, match="was changed between the model's call and `step`.*use one AdaptedGD"):
        second.step()


@pytest.mark.parametrize("how", ["copy", "pickle", "torch.save"])
def test_copies_are_whole_and_apart(how):
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5, criterion=MSE, alpha=0.9)
    MSE(model(x), y).backward()
    optimizer.step()
    MSE(model(x), y).backward()  # a pending call stays behind
    if how == "copy":
        other_model, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        other_model, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        other_model, other = torch.load(file, weights_only=False)
    assert other.last_step == optimizer.last_step
    assert other.param_groups[0]["alpha"] == 0.9
    assert all(any(p is q for q in other.param_groups[0]["params"]) for p in other_model.parameters())
    optimizer.zero_grad()
    for m, o in ((model, optimizer), (other_model, other)):
        o.criterion(m(x), y).backward()
        o.step()
        assert o.last_step.num_calls == 1
    assert torch.equal(flat(model), flat(other_model))


def test_a_copy_of_the_model_alone_is_not_watched():
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    file = io.BytesIO()
    torch.save(model, file)
    assert b"torch_adapted_gd" not in file.getvalue()  # loads where this package is not installed
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        MSE(other(x), y).backward()
        with pytest.raises(RuntimeError, match="found no call"):
            optimizer.step()


def test_a_new_optimizer_replaces_an_old_one():
    model, x, y = problem()
    old = AdaptedGD(model)
    assert len(model._forward_hooks) == 1
    del old
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not any(p._backward_hooks for p in model.parameters())
    optimizer = AdaptedGD(model, lr=0.5)
    expected = pinv_step(model, x, y, 0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


def test_data_parallel_wrapper_of_one_process(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x, y = problem()
        expected = pinv_step(model, x, y, 0.5)
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = AdaptedGD(wrapped, lr=0.5)
        MSE(wrapped(x), y).backward()
        optimizer.step()
        assert_at(model, expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.gpu
def test_cuda():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    model.cuda()
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x.cuda()), y.cuda()).backward()
    optimizer.step()
    assert_at(model.cpu(), expected)


def test_model_surgery_keeps_parameters_that_stay():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    model[0] = nn.Sequential(model[0], nn.Identity())
    expected = pinv_step(model, x, y, 0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


def test_accumulated_batches_of_unequal_size_do_not_overshoot():
    model, x, y = problem(10)
    optimizer = AdaptedGD(model, criterion=MSE)
    for part, target in ((x[:9], y[:9]), (x[9:], y[9:])):
        (MSE(model(part), target) / 2).backward()
    optimizer.step()
    assert optimizer.last_step.curvature == pytest.approx(2 / 3 / 2)  # that of the single sample, halved
    optimizer.zero_grad()
    MSE(torch.cat([model(x[:9]), model(x[9:])]), y).backward()
    optimizer.step()
    assert optimizer.last_step.curvature == pytest.approx(2 / 30)

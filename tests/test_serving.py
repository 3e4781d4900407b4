"""Every way in which training code uses an optimizer, each against the dense oracle or against the plain loop."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, HalfSquaredLoss

from .cases import MaskedMean, OldStyle, TwoHeads, dense_jacobian, flat, mlp

MSE = nn.MSELoss()


def problem(n=6, dtype=torch.float64):
    return mlp().to(dtype), torch.randn(n, 4, dtype=dtype), torch.randn(n, 3, dtype=dtype)


def pinv_step(model, x, y, eta, criterion=MSE):
    """θ after one hand-written adapted step."""
    outputs = copy.deepcopy(model)(x).detach().requires_grad_()
    g = torch.autograd.grad(criterion(outputs, y), outputs)[0].reshape(-1).double()
    return flat(model) - eta * torch.linalg.pinv(dense_jacobian(model, x), rtol=1e-7) @ g


def assert_at(model, expected, tolerance=1e-9):
    assert (flat(model) - expected).norm() <= tolerance * expected.norm()


def test_zero_grad_before_the_forward_pass():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    optimizer.zero_grad()
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


def test_zero_grad_between_forward_and_backward_keeps_the_call():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert_at(model, expected)


def test_zero_grad_after_backward_drops_the_call():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(torch.randn_like(x)), y).backward()
    optimizer.zero_grad()
    MSE(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_a_loop_that_only_clears_the_models_gradients():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    for _ in range(3):
        expected = pinv_step(model, x, y, 0.5)
        model.zero_grad()
        MSE(model(x), y).backward()
        optimizer.step()
        assert optimizer.last_step.num_calls == 1
        assert_at(model, expected)


def test_closure():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)

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


def test_gradients_by_autograd_grad_do_not_count_as_they_fill_no_grad():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)  # a look at them, say
    with pytest.raises(RuntimeError, match="backward counts, and torch.autograd.grad does not"):
        optimizer.step()
    loss.backward()
    optimizer.step()
    assert_at(model, expected)


def test_input_gradients_do_not_count():
    """As in adversarial inputs, or in u_x of a physics-informed loss."""
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    moved = x.clone().requires_grad_()
    outputs = model(moved)
    torch.autograd.grad(outputs.sum(), moved, retain_graph=True)
    MSE(model(x), y).backward()
    torch.autograd.grad(outputs.sum(), moved)
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_evaluation_passes_do_not_count():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    with torch.no_grad():
        model(torch.randn_like(x))
    with torch.inference_mode():
        model(torch.randn_like(x))
    model(torch.randn_like(x)).sum()  # its output never reaches a backward pass
    loss.backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_several_calls_in_one_loss():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(torch.cat([model(x[:1]), model(x[1:4]), model(x[4:])]), y).backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 3
    assert_at(model, expected)


def test_backward_twice_through_one_call_adds_up():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 1.0)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_backward_twice_with_zero_grad_between_counts_once():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    loss.backward(retain_graph=True)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert_at(model, expected)


def test_a_replay_is_no_call():
    model, x, y = OldStyle().double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()  # replayed in three ways
    optimizers = [AdaptedGD(model, lr=0.5), AdaptedGD(model, lr=0.5)]
    MSE(model(x), y).backward()
    optimizers[0].step()
    assert [o._recorder._count for o in optimizers] == [1, 1]


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


def test_gradients_are_left_as_a_plain_optimizer_leaves_them():
    model, x, y = problem()
    twin = copy.deepcopy(model)
    optimizer = AdaptedGD(model, lr=0.5)
    for m in (model, twin):
        MSE(m(x), y).backward()
    optimizer.step()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_the_random_stream_is_left_as_a_plain_optimizer_leaves_it():
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = AdaptedGD(model, lr=0.01)
    MSE(model(torch.randn(5, 4)), torch.randn(5, 3)).backward()
    state = torch.get_rng_state()
    optimizer.step()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.AlphaDropout(0.3), nn.RReLU(), nn.Dropout(0.2, inplace=True)])
def test_random_layers_are_replayed_with_the_users_draw(layer):
    model = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    state = torch.get_rng_state()
    rows = torch.stack([_gradient(row, model) for row in model(x).reshape(-1)])
    torch.set_rng_state(state)
    start = flat(model)
    optimizer = AdaptedGD(model, lr=0.5)
    outputs = model(x)
    torch.rand(17)  # the stream moves on before the step
    g = torch.autograd.grad(MSE(outputs, y), outputs, retain_graph=True)[0].reshape(-1)
    MSE(outputs, y).backward()
    optimizer.step()
    assert_at(model, start - 0.5 * torch.linalg.pinv(rows, rtol=1e-7) @ g)


def _gradient(output, model):
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(output, list(model.parameters()), retain_graph=True)])


@pytest.mark.parametrize("training", [True, False])
def test_batchnorm_statistics_are_updated_once(training):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double().train(training)
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    twin = copy.deepcopy(model)
    expected = pinv_step(copy.deepcopy(model), x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    twin(x)
    optimizer.step()
    assert_at(model, expected)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    assert optimizer.last_step.kernel == f"jacobian ({'whole_batch' if training else 'per_sample'})"


def test_spectral_norm_is_replayed_from_the_vectors_before_the_call():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    twin = copy.deepcopy(model)
    expected = pinv_step(copy.deepcopy(model), x, y, 0.5)
    twin(x)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected, 1e-8)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


def test_the_mode_of_the_call_counts_not_that_of_the_step():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    x, y = torch.randn(6, 4).double(), torch.randn(6, 3).double()
    expected = pinv_step(copy.deepcopy(model), x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    loss = MSE(model(x), y)
    model.eval()
    loss.backward()
    optimizer.step()
    assert_at(model, expected)
    assert not any(m.training for m in model.modules())


def test_pytree_outputs_and_the_ones_a_loss_does_not_see():
    model, x = TwoHeads().double(), torch.randn(5, 4).double()
    optimizer = AdaptedGD(model, lr=0.1)
    out = model(x)
    (out["first"].square().sum() + out["rest"][0].sum()).backward()
    optimizer.step()
    assert optimizer.last_step.num_outputs == 25
    optimizer.zero_grad()
    model(x)["first"].square().sum().backward()  # the second head is no output of this loss
    optimizer.step()
    assert optimizer.last_step.num_outputs == 10
    assert optimizer.last_step.full_rank


def test_keyword_inputs():
    model = MaskedMean().double()
    tokens, weights, y = torch.randint(7, (4, 3)), torch.rand(4, 3).double(), torch.randn(4, 2).double()
    start = flat(model)
    optimizer = AdaptedGD(model, lr=0.1)
    outputs = model(tokens, weights=weights)
    g = torch.autograd.grad(MSE(outputs, y), outputs, retain_graph=True)[0].reshape(-1)
    MSE(outputs, y).backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p, part in zip(twin.parameters(), start.split([p.numel() for p in twin.parameters()]), strict=True):
            p.copy_(part.reshape(p.shape))
    d = dense_jacobian(twin, tokens, weights=weights)
    assert_at(model, start - 0.1 * torch.linalg.pinv(d, rtol=1e-7) @ g)


def test_the_users_own_hooks_take_part_once():
    model, x, y = problem()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, output: output * 3)
    twin = nn.Sequential(*model)  # the same layers without the hooks
    outputs = (3 * twin(2 * x)).detach().requires_grad_()
    g = torch.autograd.grad(MSE(outputs, y), outputs)[0].reshape(-1)
    expected = flat(model) - 0.5 * torch.linalg.pinv(3 * dense_jacobian(twin, 2 * x)) @ g
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


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


def test_checkpointed_activations():
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, reentrant):
            super().__init__()
            self.body, self.head, self.reentrant = mlp(), nn.Linear(3, 3), reentrant

        def forward(self, x):
            return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))

    model, x, y = Checkpointed(reentrant=False).double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    plain = nn.Sequential(copy.deepcopy(model.body), copy.deepcopy(model.head))
    expected = pinv_step(plain, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)

    model = Checkpointed(reentrant=True).double()
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x.requires_grad_()), y).backward()
    with pytest.raises(RuntimeError, match="only use_reentrant=False works"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    model, x, y = problem(dtype=torch.float32)
    expected = pinv_step(copy.deepcopy(model), x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    with torch.autocast("cpu", dtype=dtype):
        loss = MSE(model(x).float(), y)
    loss.backward()
    optimizer.step()
    assert (flat(model) - expected).norm() < 0.05 * expected.norm()
    assert optimizer.last_step.off_output_fraction == 0
    assert optimizer.last_step.kernel == "jacobian (per_sample)"


def test_the_rank_cut_follows_the_arithmetic_of_the_forward_pass():
    cuts = {}
    for dtype in (None, torch.bfloat16):
        torch.manual_seed(0)
        model, x = mlp(sizes=(4, 30, 30, 3)), torch.randn(12, 4)
        x[6:] = x[:6] + 1e-4  # nearly duplicates: told apart in float32, and noise in bfloat16
        optimizer = AdaptedGD(model, lr=0.0)
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = model(x).float().square().mean()
        loss.backward()
        optimizer.step()
        cuts[dtype] = optimizer.last_step.rank
    assert cuts[None] == 36
    assert cuts[torch.bfloat16] <= 18


def test_step_inside_autocast_is_the_step_outside():
    results = []
    for inside in (True, False):
        torch.manual_seed(0)
        model, x, y = problem(dtype=torch.float32)
        optimizer = AdaptedGD(model, lr=0.5)
        MSE(model(x), y).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            optimizer.step()
        results.append(flat(model))
    assert torch.equal(*results)


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


def test_a_penalty_takes_a_plain_gradient_step():
    model, x, y = problem()
    start = flat(model)
    expected = pinv_step(model, x, y, 0.5 / (2 / 18)) - 0.5 * 0.02 * start
    optimizer = AdaptedGD(model, lr=0.5, criterion=MSE)
    loss = MSE(model(x), y) + 0.01 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    with pytest.warns(UserWarning, match=r"of the loss's gradient did not come through (.|\n)* use `weight_decay`") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert_at(model, expected)
    assert 0 < optimizer.last_step.off_output_fraction < 1
    optimizer.zero_grad()
    (MSE(model(x), y) + model[0].weight.square().sum()).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # said once


def test_clipping_the_gradients_changes_nothing_and_is_warned_of():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with pytest.warns(UserWarning, match="`.grad` of '0.weight' is not what backward delivered.* lower `lr`") as caught:
        optimizer.step()
    assert caught[0].filename == __file__
    assert_at(model, expected)
    assert optimizer.last_step.off_output_fraction == 0
    MSE(model(x), y).backward()  # .grad holds the last step's as well, which is not worth a second word
    optimizer.step()


def test_sparse_gradients():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2)

        def forward(self, tokens):
            return self.head(self.embedding(tokens).mean(1))

    model, tokens, y = Bag().double(), torch.randint(7, (4, 3)), torch.randn(4, 2).double()
    dense = copy.deepcopy(model)
    dense.embedding.sparse = False
    expected = pinv_step(dense, tokens, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    for _ in range(2):  # the same rows twice, to add sparse gradients up: the least squares solution is the same
        MSE(model(tokens), y).backward()
    optimizer.step()
    assert_at(model, expected, 1e-6)  # every row of D twice: rank-deficient, and Θ squares the condition
    assert optimizer.last_step.rank <= optimizer.last_step.num_outputs / 2


def test_a_physics_informed_network_whose_outputs_are_residuals():
    class Residual(nn.Module):
        """u'' + u on given points, and u at the ends."""

        def __init__(self):
            super().__init__()
            self.net = mlp(sizes=(1, 10, 10, 1))

        def forward(self, x):
            with torch.enable_grad():
                x = x.requires_grad_() if x.is_leaf and not torch._C._functorch.is_functorch_wrapped_tensor(x) else x
                u = self.net(x)
                slope = torch.autograd.grad(u.sum(), x, create_graph=True)[0]
                return torch.autograd.grad(slope.sum(), x, create_graph=True)[0] + u

    model = Residual().double()
    x = torch.linspace(0, 1, 8, dtype=torch.float64).unsqueeze(1)
    target = torch.ones(8, 1, dtype=torch.float64)
    optimizer = AdaptedGD(model, criterion=HalfSquaredLoss())
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = HalfSquaredLoss()(model(x.clone()), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-12 * losses[0]


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
        MSE(m(x), y).backward()
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


@pytest.mark.parametrize("way", ["wrapper", "module", "in place", "wrapper, called before", "inner"])
def test_compiled_models(way):
    compiled_calls = []

    def backend(graph, inputs):
        return lambda *args: compiled_calls.append(1) or graph(*args)

    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    plain = model
    if way == "in place":
        model.compile(backend=backend)
    elif way == "inner":
        model = nn.Sequential(torch.compile(model, backend=backend))
    else:
        model = torch.compile(model, backend=backend)
        if way == "wrapper, called before":
            model(x)
    optimizer = AdaptedGD(plain if way == "module" else model, lr=0.5)
    MSE(model(x), y).backward()
    count = len(compiled_calls)
    assert count > 0 or way in ("module", "in place")  # torch 2.6 compiles no module with hooks of its own
    optimizer.step()
    assert len(compiled_calls) == count  # torch.func differentiates the eager module
    assert optimizer.last_step.num_calls == 1
    assert optimizer.last_step.kernel == "jacobian (per_sample)"
    assert_at(plain, expected)
    torch.compiler.reset()


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


def test_more_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    model, x, y = problem()
    optimizer = AdaptedGD(model)
    MSE(model(x), y).backward()
    with pytest.raises(RuntimeError, match="4 processes are training together.* Train in a single process"):
        optimizer.step()


@pytest.mark.gpu
def test_cuda():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    model.cuda()
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x.cuda()), y.cuda()).backward()
    optimizer.step()
    assert_at(model.cpu(), expected)


@pytest.mark.gpu
def test_cuda_dropout_amp_and_batchnorm():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).cuda()
    optimizer = AdaptedGD(model, lr=0.1, damping=1e-3)
    scaler = torch.amp.GradScaler("cuda")
    x, y = torch.randn(6, 4, device="cuda"), torch.randn(6, 3, device="cuda")
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = MSE(model(x).float(), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.last_step.identity_gap < 1e-6


def test_an_input_buffer_that_is_refilled():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    model[0].requires_grad_(False)  # autograd itself would need the first layer's input
    frozen = pinv_step(model, x, y, 0.5)
    assert len(frozen) < len(expected)
    optimizer = AdaptedGD(model, lr=0.5)
    buffer = x.clone()
    loss = MSE(model(buffer), y)
    buffer.zero_()
    loss.backward()
    optimizer.step()
    assert_at(model, frozen)


def test_a_forward_pass_that_changes_its_input():
    model = nn.Sequential(nn.LeakyReLU(0.3, inplace=True), nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = pinv_step(nn.Sequential(nn.LeakyReLU(0.3), model[1]), x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    given = x.clone()
    MSE(model(given), y).backward()
    changed = given.clone()
    optimizer.step()
    assert_at(model, expected)
    assert torch.equal(given, changed)


class Halves(nn.Module):
    """Outputs that share one operation, one of them unused by the loss."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 6)

    def forward(self, x):
        return self.layer(x).chunk(2, 1)


class Features(nn.Module):
    """Outputs of which one is computed from the other."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 7), nn.Linear(7, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(h), h


@pytest.mark.parametrize("build", [Halves, Features])
def test_only_what_the_loss_uses_of_related_outputs_counts(build):
    class First(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)[0]

    model, x, y = build().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    expected = pinv_step(First(copy.deepcopy(model)), x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x)[0], y).backward()
    optimizer.step()
    assert optimizer.last_step.num_outputs == 18
    assert_at(model, expected)


def test_outputs_may_be_changed_in_place():
    for build in (Halves, mlp):
        model, x, y = build().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
        twin, optimizer = copy.deepcopy(model), AdaptedGD(model, lr=0.5)
        reference = AdaptedGD(twin, lr=0.5)
        out, other = (m(x)[0] if build is Halves else m(x) for m in (model, twin))
        out.mul_(2)[:, 0].add_(1)
        MSE(out, y).backward()
        MSE(2 * other + torch.tensor([1.0, 0, 0]).double(), y).backward()
        optimizer.step()
        reference.step()
        assert_at(model, flat(twin))


class Coupled(nn.Module):
    """Samples interact, but a head of zeros hides it from the outputs."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(h - h.mean(0))


def test_a_coupling_that_the_outputs_hide_is_found_out():
    model, x, y = Coupled().double(), torch.randn(6, 4).double(), torch.randn(6, 3).double()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.kernel == "jacobian (whole_batch)"
    assert_at(model, expected)


def test_what_hooks_and_modules_keep_can_be_used_after_the_step():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            self.kept = self.net[0](x)
            return self.net(x)

    for layers in ((), (nn.BatchNorm1d(3),)):  # per sample, and the whole batch
        model = nn.Sequential(Keeps(), *layers).double()
        seen = {}
        model[0].net[1].register_forward_hook(lambda module, args, output, seen=seen: seen.update(a=output.detach()))
        optimizer = AdaptedGD(model, lr=0.5)
        out = model(torch.randn(6, 4).double())
        kept, before = model[0].kept, seen["a"]
        MSE(out, torch.zeros(6, 3).double()).backward()
        optimizer.step()
        assert model[0].kept is kept
        torch.testing.assert_close(seen["a"], before)


def test_clearing_gradients_on_the_model_drops_the_call():
    for clear in (lambda m: m.zero_grad(), lambda m: m.zero_grad(set_to_none=False)):
        model, x, y = problem()
        expected = pinv_step(model, x, y, 0.5)
        optimizer = AdaptedGD(model, lr=0.5)
        MSE(model(torch.randn_like(x)), y).backward()  # for its input gradient, say
        clear(model)
        MSE(model(x), y).backward()
        optimizer.step()
        assert optimizer.last_step.num_calls == 1
        assert_at(model, expected)


def test_model_surgery_keeps_parameters_that_stay():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    model[0] = nn.Sequential(model[0], nn.Identity())
    expected = pinv_step(model, x, y, 0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


def test_parameters_without_a_gradient_stay():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5, weight_decay=0.1)
    before = model[0].weight.clone()
    MSE(model(x), y).backward(inputs=list(model[4].parameters()))
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert optimizer.last_step.num_params == sum(p.numel() for p in model[4].parameters())
    assert optimizer.last_step.off_output_fraction == 0


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


def test_a_model_that_calls_itself():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x, depth=1):
            h = torch.tanh(self.inner(x))
            return self.outer(self(h, depth=0)) if depth else h

    model, x, y = Recursive().double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert_at(model, expected)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_forward_pass_that_raised_is_forgotten(error):
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    handle = model[2].register_forward_pre_hook(lambda module, args: raise_(error))
    with pytest.raises(error):
        model(x)
    assert error is KeyboardInterrupt or not optimizer._recorder._running
    handle.remove()
    expected = pinv_step(model, x, y, 0.5)
    MSE(model(x), y).backward()
    assert not optimizer._recorder._running
    optimizer.step()
    assert_at(model, expected)


def raise_(error):
    raise error


def test_a_loss_of_what_the_model_keeps_beside_its_output():
    class Keeps(Halves):
        def forward(self, x):
            first, self.second = self.layer(x).chunk(2, 1)
            return first

    model, x, _ = Keeps().double(), *problem()[1:]
    optimizer = AdaptedGD(model, lr=0.5)
    model(x)
    model.second.sum().backward()  # sends the returned half an undefined gradient
    with pytest.raises(RuntimeError, match="although the parameters received gradients"):
        optimizer.step()


def test_hooks_registered_later_take_part():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,), prepend=True)
    model.register_forward_hook(lambda module, args, output: output * 3)
    MSE(model(x), y).backward()
    with pytest.raises(RuntimeError, match="could not be repeated"):
        optimizer.step()  # this once, the other pre-hook ran first
    optimizer.zero_grad()
    MSE(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.off_output_fraction == 0


def test_buffers_that_are_reassigned():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.register_buffer("mean", torch.zeros(4))

        def forward(self, x):
            if self.training:
                self.mean = 0.9 * self.mean + 0.1 * x.mean(0).detach()
            return self.layer(x - self.mean)

    model, x, y = Centred().double(), torch.randn(5, 4).double(), torch.randn(5, 3).double()
    expected = pinv_step(copy.deepcopy(model), x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    MSE(model(x), y).backward()
    mean = model.mean.clone()
    optimizer.step()
    assert_at(model, expected)
    assert torch.equal(model.mean, mean)


def test_vectorized_jacobians_of_the_user_are_let_through():
    model, x, y = problem()
    optimizer = AdaptedGD(model, lr=0.5)
    jacobian = torch.autograd.functional.jacobian(model, x, vectorize=True)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(copy.deepcopy(model), x))
    expected = pinv_step(model, x, y, 0.5)
    MSE(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_a_backward_pass_that_raised_leaves_nothing():
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise MemoryError("no luck")

    model, x, y = problem()
    breaking = nn.Sequential(model)
    breaking.register_forward_hook(lambda module, args, output: output if good else Breaks.apply(output))
    optimizer = AdaptedGD(breaking, lr=0.5)
    good = False
    with pytest.raises(MemoryError, match="no luck"):
        MSE(breaking(x), y).backward()
    good = True
    expected = pinv_step(model, x, y, 0.5)
    MSE(breaking(x), y).backward()
    optimizer.step()
    assert optimizer.last_step.num_calls == 1
    assert_at(model, expected)


def test_penalties_are_seen_under_autocast():
    model, x, y = problem(dtype=torch.float32)
    optimizer = AdaptedGD(model, lr=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = MSE(model(x).float(), y) + 0.01 * sum(p.square().sum() for p in model.parameters())
    loss.backward()
    with pytest.warns(UserWarning, match="did not come through"):
        optimizer.step()


def test_threads_with_models_of_their_own():
    from concurrent.futures import ThreadPoolExecutor

    def train(seed):
        generator = torch.Generator().manual_seed(seed)
        model = mlp().double()
        x, y = (torch.randn(6, n, dtype=torch.float64, generator=generator) for n in (4, 3))
        optimizer = AdaptedGD(model, criterion=MSE)
        for _ in range(8):
            optimizer.zero_grad()
            MSE(model(x), 0.3 * y).backward()
            optimizer.step()
        return float(MSE(model(x), 0.3 * y).detach())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with ThreadPoolExecutor(2) as pool:
            assert max(pool.map(train, range(4))) < 1e-12


def test_tracing_is_let_through():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x, _ = problem()
        optimizer = AdaptedGD(model)
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))
        del optimizer

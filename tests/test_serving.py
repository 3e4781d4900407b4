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


def test_backward_through_autograd_grad_counts_too():
    model, x, y = problem()
    expected = pinv_step(model, x, y, 0.5)
    optimizer = AdaptedGD(model, lr=0.5)
    for p, gradient in zip(model.parameters(), torch.autograd.grad(MSE(model(x), y), list(model.parameters())), strict=True):
        p.grad = gradient
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
    optimizer.zero_grad()
    scaler.scale(MSE(model(x), y)).backward()
    scaler.step(optimizer)
    assert optimizer.last_step.status == "full_rank"


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
    with pytest.warns(UserWarning, match=r"% of the loss's gradient did not come through .* use `weight_decay`") as caught:
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
    for _ in range(2):
        optimizer.zero_grad()
        MSE(model(tokens), y).backward()
        if flat(model).equal(flat(dense)):
            optimizer.step()
    assert_at(model, expected)


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
    assert count > 0
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

"""Rules: every order of contraction, rules of users, and what is found out when one is wrong."""

import pytest
import torch
from torch import nn

from torch_adapted_gd import AdaptedGD, Dense, HalfSquaredLoss, OuterProducts, ntk
from torch_adapted_gd.jacobian import blocks, factored, gram, linearized, products, rules, tangent_jacobian, tokens
from torch_adapted_gd.jacobian.definition import recorded

from .cases import MSE, dense_jacobian, flat, mlp, problem
from .layers import LAYERS, Checkpointed, draw
from .test_structured import relative_error


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_both_orders_of_contraction(name, written, monkeypatch):
    build, shape = LAYERS[name]
    monkeypatch.setattr(products.SharedLeftFactor, "explicit_is_cheaper", lambda self: written)
    assert relative_error(build().double(), draw(shape, 4, torch.float64)) <= 1e-12


@pytest.mark.parametrize("written", [True, False, None])
@pytest.mark.parametrize(
    "name", ["linear", "linear_on_sequences", "conv2d_groups", "layer_norm", "multihead_attention", "positions"]
)
def test_tiles_blocks_and_chunks_of_all_sizes(name, written, monkeypatch):
    build, shape = LAYERS[name]
    if written is not None:
        monkeypatch.setattr(products.SharedLeftFactor, "explicit_is_cheaper", lambda self: written)
    model, x = build().double(), draw(shape, 7, torch.float64)
    for rows, small in ((1, 1), (7, 50), (9, 1000)):
        monkeypatch.setattr(blocks, "TILE_ROWS", rows)
        monkeypatch.setattr(gram, "TILE_ROWS", max(1, rows // 2))
        monkeypatch.setattr(gram, "_CAST_ELEMENTS", small)
        monkeypatch.setattr(gram, "_LEAST_WIDTH", 1)
        monkeypatch.setattr(linearized, "_ELEMENTS_AT_ONCE", small)
        for constant in ("_WRITTEN_ELEMENTS", "_WORK_ELEMENTS"):
            monkeypatch.setattr(products, constant, small)
        assert relative_error(model, x) <= 1e-12
    monkeypatch.setattr(factored, "_CHUNK_BYTES", 1)  # as many chunks as can be
    assert relative_error(model, x) <= 1e-12


def test_the_cheaper_order_is_chosen():
    """By operations: written out where the weight is small, contracted where there are many inputs or few places."""

    def shared(n, q, o, i, t):
        term = OuterProducts(torch.zeros(n, q, 1, o, t), torch.zeros(n, 1, i, t))
        return products.SharedLeftFactor([term], [term])

    assert not shared(64, 10, 256, 784, 1).explicit_is_cheaper()
    assert shared(64, 10, 16, 9, 784).explicit_is_cheaper()
    assert not shared(64, 10, 768, 768, 16).explicit_is_cheaper()
    assert shared(64, 10, 10, 1, 1).explicit_is_cheaper()


class Centred(nn.Module):
    """Samples interact in a way that no module's type tells."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(h - h.mean(0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)),
            r"for 2 of 6 parameters: the samples of a batch interact behind linear of '0.bias', '0.weight'",
        ),
        (Centred, r"interact behind linear of 'body.bias', 'body.weight'\. This is exact"),
    ],
)
def test_models_whose_samples_interact(build, message):
    model, x, y = build().double(), torch.randn(6, 4).double(), torch.randn(6, 2).double()
    d = dense_jacobian(model, x)
    with pytest.warns(UserWarning, match=message):
        theta = ntk(model, x)
    torch.testing.assert_close(theta.reshape(12, 12), d @ d.T)
    torch.testing.assert_close(ntk(model, x, method="jacobian"), theta)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="the samples of a batch interact behind"):
        ntk(model, x, method="structured")
    optimizer = AdaptedGD(model, lr=0.5, solver=Dense(kernel="structured"))
    MSE(model(x), y).backward()
    with pytest.raises(RuntimeError, match="the samples of a batch interact behind"):
        optimizer.step()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in before.items() if name in parameters)


@pytest.mark.parametrize(
    "name", ["conv2d_groups", "residual_block", "lstm_classifier", "tied_autoencoder", "called_three_times", "u_net"]
)
def test_steps_are_those_of_the_jacobian(name):
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    models = [build().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    batches = [draw(shape, n, torch.float64) for n in (2, 3)]
    targets = [torch.randn_like(models[0](*x)) for x in batches]
    results = []
    for model, kernel in zip(models, ("structured", "jacobian"), strict=True):
        criterion = HalfSquaredLoss()
        optimizer = AdaptedGD(model, lr=0.5, damping=1e-2, criterion=criterion, solver=Dense(kernel=kernel))
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in zip(batches, targets, strict=True):  # accumulated: two calls, one system
                (criterion(model(*x), y) / 2).backward()
            optimizer.step()
        assert optimizer.last_step.kernel.startswith(kernel)
        assert optimizer.last_step.identity_gap < 1e-9
        results.append(flat(model))
    assert (results[0] - results[1]).norm() <= 1e-10 * results[1].norm()


def test_outputs_of_ill_conditioned_float32_networks_move_as_asked():
    """Dᵀψ by a float32 backward pass would not do: its rounding, κ(D)²ε, is of the size of the step."""
    torch.manual_seed(1)
    model = mlp(sizes=(4, 60, 60, 3))
    x = torch.randn(12, 4)
    x = torch.cat([x, x + 1e-3 * torch.randn(12, 4)])  # nearly the same points twice
    d = dense_jacobian(model, x)
    kappa = float(torch.linalg.cond(d))
    assert 1e4 < kappa < 1e6
    g = torch.randn(72, dtype=torch.float64)
    call, names = recorded(model, (x,))
    jacobian = tangent_jacobian(model, [call], names, method="structured")
    psi = torch.linalg.solve(jacobian.gram(), g)
    direction = torch.cat(list(jacobian.rmv(psi).values()))
    assert (d @ direction - g).norm() <= 4 * kappa * torch.finfo(torch.float32).eps * g.norm()
    outputs = model(x)
    plain = torch.autograd.grad(outputs, list(model.parameters()), psi.reshape(24, 3).float())
    worse = torch.cat([part.reshape(-1).double() for part in plain])
    assert (d @ worse - g).norm() > 10 * (d @ direction - g).norm()


def test_a_hook_that_changes_a_layers_output_and_one_that_changes_its_input():
    model, x, _ = problem()
    model[0].register_forward_hook(lambda module, args, output: output.sin())
    model[2].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    assert relative_error(model, (x,)) <= 1e-12
    assert (len(model[0]._forward_hooks), len(model[2]._forward_pre_hooks)) == (1, 1)


def test_dropout_that_is_drawn_again_in_backward_passes():
    assert relative_error(Checkpointed(0.3).double(), (torch.randn(5, 4).double(),)) <= 1e-12


def test_a_layer_that_raises_within_the_model():
    class Tries(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            try:
                self.first(x[:, :3])
            except RuntimeError:
                return self.second(torch.tanh(self.first(x))) @ self.first.weight

    model, x = Tries().double(), torch.randn(3, 4).double()
    d = dense_jacobian(model, x)
    torch.testing.assert_close(ntk(model, x).reshape(12, 12), d @ d.T)


def test_derivatives_of_the_network_as_outputs():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(sizes=(1, 6, 6, 1))

        def forward(self, x):
            def u(point):
                return torch.func.functional_call(self.net, dict(self.net.named_parameters()), (point,)).squeeze()

            return torch.vmap(torch.func.hessian(u))(x).reshape(-1, 1) + self.net(x)

    model, x = Residual().double(), torch.randn(4, 1).double()
    d = dense_jacobian(model, x)
    torch.testing.assert_close(ntk(model, x).reshape(4, 4), d @ d.T)  # quietly: by their uses


def test_some_parameters_alone():
    model, x, _ = problem()
    names = ["0.weight", "4.bias"]
    d = dense_jacobian(model, x)
    spans, start = {}, 0
    for name, p in model.named_parameters():
        spans[name] = slice(start, start + p.numel())
        start += p.numel()
    d = torch.cat([d[:, spans[name]] for name in names], 1)
    theta = tangent_jacobian(model, [recorded(model, (x,))[0]], names, method="structured").gram()
    torch.testing.assert_close(theta, d @ d.T)


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_on_a_gpu(name):
    build, shape = LAYERS[name]
    if name == "positions":
        pytest.skip("makes its positions on the CPU")
    model, x = build().double(), draw(shape, 5, torch.float64)
    d = dense_jacobian(model, *x)
    model, x = model.cuda(), tuple(part.cuda() for part in x)
    call, names = recorded(model, x)
    for options in ({}, {"chunk_size": 2}):
        theta = tangent_jacobian(model, [call], names, **options).gram()
        assert theta.device.type == "cuda"
        assert float((theta.cpu() - d @ d.T).norm() / (d @ d.T).norm()) <= 1e-12


def test_few_wide_places_are_contracted(monkeypatch):
    """The order for sequences, in the sizes that it is meant for: not a toy that both orders pass."""
    chosen = []
    original = products.SharedLeftFactor.explicit_is_cheaper

    def spy(self):
        chosen.append(original(self))
        return chosen[-1]

    monkeypatch.setattr(products.SharedLeftFactor, "explicit_is_cheaper", spy)
    model = nn.Sequential(nn.Linear(3, 60), nn.Tanh(), nn.Linear(60, 60), nn.Flatten(), nn.Linear(120, 2))
    assert relative_error(model.double(), (torch.randn(5, 2, 3).double(),)) <= 1e-12
    assert True in chosen
    assert False in chosen


@pytest.mark.parametrize("size", [3, 40, 500])
@pytest.mark.parametrize("many", [0.0, 1 / 16, 2.0])
def test_embeddings_of_few_and_many_tokens(size, many, monkeypatch):
    """Rows of the table that many samples use are written out, others taken pair by pair: either way, and both."""
    monkeypatch.setattr(tokens, "_MANY", many)
    monkeypatch.setattr(tokens, "_ELEMENTS", 99)

    def term(n, q, t):
        index = torch.randint(size, (n, t))
        return OuterProducts(torch.randn(n, q, 1, 5, t, dtype=torch.float64), products.OneHot(index, size), flipped=True)

    for first, second in ((term(6, 4, 8), term(7, 3, 9)), (term(6, 4, 8), None)):
        one = [first]
        shared = products.SharedLeftFactor(one, one if second is None else [second])
        rows, columns = (each.explicit().flatten(0, 1) for each in (first, second or first))
        theta = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        tokens.add_by_index(theta, shared)
        apart = theta - rows @ columns.T
        assert float((apart if second else apart.triu()).norm()) <= 1e-12 * float(rows.norm() * columns.norm())


def test_addmm_with_a_bias_goes_by_its_rule(monkeypatch):
    """Linear layers of GPT-2: rows of positions, matrix and bias in one call."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))

        def forward(self, x):
            return torch.addmm(self.bias, x.reshape(-1, 3), self.weight).view(len(x), -1)

    def never(use):
        raise AssertionError

    monkeypatch.setattr(linearized, "GENERIC", rules.Rule(never, sample_dims="any"))
    assert relative_error(Layer().double(), (torch.randn(5, 2, 3).double(),)) <= 1e-12


def test_gradients_that_are_no_derivatives_are_those_of_backward():
    """`scale_grad_by_freq` divides by counts in the batch: no rule knows that."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Linear(3, 2)

        def forward(self, tokens):
            return self.head(torch.tanh(self.embedding(tokens)).sum(1))

    model, tokens = Counted().double(), torch.randint(5, (4, 3))
    outputs = model(tokens).reshape(-1)
    rows = [torch.autograd.grad(x, list(model.parameters()), retain_graph=True) for x in outputs]
    d = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    torch.testing.assert_close(ntk(model, tokens, method="jacobian").reshape(8, 8), d @ d.T)
    call, names = recorded(model, (tokens,))
    torch.testing.assert_close(tangent_jacobian(model, [call], names).gram(), d @ d.T)


def test_random_numbers_within_a_module_without_a_rule():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.dropout = nn.Linear(3, 3), nn.Dropout(0.5)
            self.lstm, self.head = nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.lstm(self.dropout(self.inner(x)))[0][:, -1])

    model, x = Noisy().double(), torch.randn(4, 5, 3).double()
    d = dense_jacobian(model, x)
    torch.testing.assert_close(ntk(model, x).reshape(8, 8), d @ d.T)  # quietly: nothing is wrong with the model


def test_the_graph_is_given_back_before_the_kernel_is_used():
    model, x, _ = problem()
    call, names = recorded(model, (x,))
    jacobian = tangent_jacobian(model, [call], names)
    assert all(piece._passes.x.grad_fn is None for piece in jacobian._pieces)

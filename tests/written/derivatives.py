"""Derivatives of networks, as people write them."""

import math

import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev, jvp, vmap

from .linear import Dense
from .parts import param, tanh_net


def gradient(u, x):
    return torch.autograd.grad(u, x, grad_outputs=torch.ones_like(u), create_graph=True)[0]


class SecondDerivative(nn.Module):
    """Poisson's equation in one dimension, with a hard boundary condition."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(1, 4, 3, 1)

    def forward(self, x):
        x = x.clone().requires_grad_(True)
        u = x * (1 - x) * self.net(x)
        return gradient(gradient(u, x), x) + torch.sin(math.pi * x)


class SourceTerm(nn.Module):
    """The residual of Poisson's equation and nothing else: the last bias has no part in it."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(1, 4, 3, 1)

    def forward(self, x):
        x = x.clone().requires_grad_(True)
        return gradient(gradient(self.net(x), x), x) - x.exp()


class Laplacian(nn.Module):
    """In two dimensions, of points in one tensor, derivative by derivative."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 4, 1)

    def forward(self, x):
        x.requires_grad_(True)
        u = self.net(x)
        du = gradient(u, x)
        u_xx = gradient(du[:, 0:1], x)[:, 0:1]
        u_yy = gradient(du[:, 1:2], x)[:, 1:2]
        return torch.cat([u_xx + u_yy, u], 1)


class Residual(nn.Module):
    """Burgers' equation: coordinates in tensors of their own, concatenated again, and weights by hand."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1, self.w2 = param(2, 4), param(4), param(4, 1)

    def u(self, x, t):
        return torch.tanh(torch.cat([x, t], dim=1) @ self.w1 + self.b1) @ self.w2

    def forward(self, points):
        x = points[:, 0:1].clone().requires_grad_()
        t = points[:, 1:2].clone().requires_grad_()
        u = self.u(x, t)
        u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
        u_xx = torch.autograd.grad(u_x.sum(), x, create_graph=True)[0]
        return (u_t + u * u_x - 0.1 * u_xx).squeeze(-1)


class Beam(nn.Module):
    """A fourth derivative."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(1, 4, 1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        u = self.net(x)
        u_2 = gradient(gradient(u, x), x)
        return torch.cat([u, u_2, gradient(gradient(u_2, x), x)], 1)


class NavierStokes(nn.Module):
    """Velocity from a stream function, a pressure, and a viscosity: Q = 3."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 2)

    def forward(self, points):
        points = points.detach().clone().requires_grad_()
        psi, p = self.net(points).split(1, dim=1)
        psi_x, psi_y = gradient(psi, points).split(1, dim=1)
        u, v = psi_y, -psi_x
        (u_x, u_y), (v_x, v_y) = gradient(u, points).split(1, 1), gradient(v, points).split(1, 1)
        u_xx, u_yy = gradient(u_x, points)[:, :1], gradient(u_y, points)[:, 1:]
        v_xx, v_yy = gradient(v_x, points)[:, :1], gradient(v_y, points)[:, 1:]
        p_x, p_y = gradient(p, points).split(1, 1)
        f = u * u_x + v * u_y + p_x - 0.1 * (u_xx + u_yy)
        g = u * v_x + v * v_y + p_y - 0.1 * (v_xx + v_yy)
        return torch.cat([f, g, p], 1)


class Periodic(nn.Module):
    """The same network at the two ends, and its derivatives there."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 1)

    def forward(self, x):
        left = x.detach().requires_grad_()
        right = (x.detach() + 1).requires_grad_()
        u, v = self.net(left), self.net(right)
        return torch.cat([u - v, gradient(u, left) - gradient(v, right)], 1)


class InsideAndBoundary(nn.Module):
    """Points of two kinds in one call of the network: rows of the residual, then rows of boundary values."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(4, 3, 1)

    def forward(self, inside, boundary):
        x = torch.cat([inside, boundary]).requires_grad_()
        u = self.net(x)
        du = gradient(u, x)
        u_xx = sum(gradient(du[:, i], x)[:, i] for i in range(2))
        return torch.cat([u_xx[: len(inside)], 10 * u[len(inside) :, 0]]).unsqueeze(1)


class InsideThenBoundary(nn.Module):
    """The same with the network called twice, and the kinds told apart by their place in the batch."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 1)

    def forward(self, x):
        inside, boundary = x[:-2].clone().requires_grad_(), x[-2:]
        u = self.net(inside)
        u_x, u_y = gradient(u, inside).split(1, dim=1)
        return torch.cat([u_x + gradient(u_y, inside)[:, 1:] - u**2, self.net(boundary)])


class InverseProblem(nn.Module):
    """A coefficient of the equation is a parameter too."""

    def __init__(self):
        super().__init__()
        self.net, self.nu, self.log_k = tanh_net(2, 4, 1), nn.Parameter(torch.tensor(0.7)), param(1)

    def forward(self, x):
        x = x.detach().requires_grad_()
        u = self.net(x)
        u_x = gradient(u, x)
        u_xx = gradient(u_x[:, :1], x)[:, :1]
        return torch.cat([u_x[:, 1:] - self.nu * u_xx + self.log_k.exp() * u, u], 1)


class NormedSolution(nn.Module):
    """A second derivative through LayerNorm."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))
        nn.init.normal_(self.net[1].weight)

    def forward(self, x):
        x = x.detach().requires_grad_()
        u = self.net(x)
        du = gradient(u, x)
        return torch.cat([gradient(du[:, :1], x)[:, :1] - du[:, 1:], u], 1)


class AdaptiveSlopes(nn.Module):
    """Learned slopes within activations, and layers by hand."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Dense(1, 4), Dense(4, 3), Dense(3, 1)])
        self.a, self.slopes = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.rand(3) + 0.5)

    def forward(self, x):
        x = x.detach().requires_grad_()
        h = torch.tanh(10 * self.a * self.layers[0](x))
        h = torch.tanh(self.slopes * self.layers[1](h))
        u = self.layers[2](h)
        return gradient(gradient(u, x), x) + u**3


class EnergyForces(nn.Module):
    """Forces as the gradient of an energy, by sample."""

    def __init__(self):
        super().__init__()
        self.centres, self.log_width, self.w = param(4, 3), param(4), param(4)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            d = (x[:, None] - self.centres).square().sum(-1)
            energy = torch.exp(-d / (1 + self.log_width.exp())) @ self.w
            return -torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


class Hamiltonian(nn.Module):
    """A field by torch.func.grad and vmap of an energy of one point, closing over the module."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 1)

    def forward(self, x):
        q, p = vmap(torch.func.grad(lambda z: self.net(z).squeeze()))(x).unbind(1)
        return torch.stack([p, -q], 1)


class HessianOfCall(nn.Module):
    """The Laplacian by torch.func.hessian of functional_call under vmap."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 1)

    def forward(self, x):
        params = dict(self.net.named_parameters())

        def u(params, point):
            return functional_call(self.net, params, (point,)).squeeze(-1)

        laplacian = vmap(lambda point: hessian(u, argnums=1)(params, point).diagonal().sum())
        return torch.stack([laplacian(x), vmap(u, in_dims=(None, 0))(params, x)], 1)


class HessianOfClosure(nn.Module):
    """The same of a closure, with weights by hand."""

    def __init__(self):
        super().__init__()
        self.w, self.b, self.v = param(4, 2), param(4), param(4)

    def u(self, point):
        return self.v @ torch.tanh(self.w @ point + self.b)

    def forward(self, x):
        return vmap(lambda point: torch.trace(hessian(self.u)(point)))(x).unsqueeze(1)


class JacobianRows(nn.Module):
    """The Laplacian by jacrev of jacrev under vmap, and a divergence."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 3, 2)

    def forward(self, x):
        first = vmap(jacrev(self.net))(x)  # [n, 2, 2]
        second = vmap(jacrev(jacrev(self.net)))(x)  # [n, 2, 2, 2]
        return torch.stack([first.diagonal(dim1=1, dim2=2).sum(1), second[:, 0].diagonal(dim1=1, dim2=2).sum(1)], 1)


class ForwardDerivatives(nn.Module):
    """Second derivatives by jvp of jvp, along each coordinate."""

    def __init__(self):
        super().__init__()
        self.net = tanh_net(2, 4, 1)

    def forward(self, x):
        def along(i):
            v = torch.zeros_like(x)
            v[:, i] = 1
            return jvp(lambda y: jvp(self.net, (y,), (v,))[1], (x,), (v,))[1]

        return torch.cat([along(0) + along(1), jvp(self.net, (x,), (x,))[0]], 1)


MODELS = {
    "second_derivative": (SecondDerivative, (1,)),
    "source_term": (SourceTerm, (1,)),
    "laplacian": (Laplacian, (2,)),
    "burgers": (Residual, (2,)),
    "beam": (Beam, (1,)),
    "navier_stokes": (NavierStokes, (2,)),
    "periodic": (Periodic, (2,)),
    "inside_and_boundary": (InsideAndBoundary, None),
    "inside_then_boundary": (InsideThenBoundary, (2,)),
    "inverse_problem": (InverseProblem, (2,)),
    "layer_norm_inside": (NormedSolution, (2,)),
    "slopes_inside": (AdaptiveSlopes, (1,)),
    "energy_forces": (EnergyForces, (3,)),
    "hamiltonian": (Hamiltonian, (2,)),
    "hessian_of_call": (HessianOfCall, (2,)),
    "hessian_of_closure": (HessianOfClosure, (2,)),
    "jacobian_rows": (JacobianRows, (2,)),
    "forward_derivatives": (ForwardDerivatives, (2,)),
}

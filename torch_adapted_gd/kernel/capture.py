"""A replay of a call that finds what went into each module that owns parameters, and what the outputs send back to it."""

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from ..calls import Call
from ..jacobian import dtype_and_device
from ..replay import Replay, precision
from .module_calls import Layout, ModuleCall
from .products import OuterProducts
from .rules import GENERIC, Rule, rule_for

_ELEMENTS_AT_ONCE = 2**21  # entries of B that one vectorized backward pass makes on the CPU: about what its cache holds


class Capture:
    """The replay of a call with its graph, from which gradients of the outputs at the modules' outputs can be had.

    Three plain backward passes come first. That of a random u gives Dᵀu, which the rules' results are held against, and
    tells which parameters are used elsewhere than in their own module. That of s∘u, s a factor for each sample, finds the
    dimension in which a module's output has the samples: it has to be scaled by s there, or samples interact behind it.
    That of g gives ∇_θC as far as it came through the outputs.

    Attributes:
        replay: The replay.
        module_calls: The calls of modules whose parameters a rule may serve, with Σ_q u_q B_q for B, as if Q were 1.
        probe_products: Their parts of Dᵀu by a plain backward pass, a dict by parameter's name in the module for each.
        probe_product: Dᵀu in all, by parameter; one that is not there has none.
        gradient: Dᵀg by a plain backward pass for the gradients g that the outputs received, likewise.
        unserved: Parameters that cannot be served, and why.
        coupled: The last module call behind which samples interact, if there is one.
    """

    def __init__(self, model: nn.Module, call: Call, names: list[str]) -> None:
        self.replay = replay = Replay(model, call, names)
        parameters = dict(model.named_parameters())
        self._dtype, _ = dtype_and_device([parameters[name] for name in names])
        self.coupled: ModuleCall | None = None
        # Backward hooks should see tensors that they can keep.
        self._vectorized = not any(m._backward_hooks or m._backward_pre_hooks for m in model.modules())
        with replay.conditions():
            with _watched(replay) as calls:
                moving, self._x = replay.plain_outputs()
            leaves = [*moving.values(), *(alias for c in calls for alias in c.aliases.values())]
            edges = [edge for c in calls for edge in c.edges.values()]
            draw = torch.randn(replay.n, generator=torch.Generator("cpu").manual_seed(1), dtype=torch.float64, device="cpu")
            scale = draw.to(self._x.device)  # s, [N]
            with torch.autocast(self._x.device.type, enabled=False):  # a user's backward pass does not run under it either
                found = self._backward(replay.probe, [*leaves, *edges])
                scaled = self._backward((replay.probe.view(replay.n, -1) * scale[:, None]).reshape(-1), edges)
                gradients = self._backward(replay.output_gradients(), leaves) if call.gradients else []
        owners = [*names, *(name for c in calls for name in c.parameters.values())]
        self.probe_product = _by_parameter(owners, found[: len(leaves)])
        self.gradient = _by_parameter(owners[: len(gradients)], gradients)
        elsewhere = (name for name, product in zip(names, found, strict=False) if product is not None)
        self.unserved: dict[str, str] = dict.fromkeys(elsewhere, "it is used outside the module that owns it")
        products = iter(found[len(names) :])
        of_leaves = [[next(products) for _ in c.aliases] for c in calls]
        self._find_layouts(calls, list(products), scaled, scale)
        self.module_calls, self.probe_products = [], []
        for c, of_call in zip(calls, of_leaves, strict=True):
            by_name = {local: p for local, p in zip(c.parameters, of_call, strict=True) if p is not None}
            if not c.layouts:
                for local in by_name:
                    self.unserved.setdefault(c.parameters[local], "it reaches the outputs by other ways")
            elif by_name:
                self.module_calls.append(c)
                self.probe_products.append(by_name)

    @property
    def elements(self) -> int:
        """Entries of B for one output of all samples."""
        return sum(shape.numel() for c in self.module_calls for shape in c.shapes.values())

    def release(self) -> None:
        """Give the graph back."""
        del self._x

    def apply_rule(self, call: ModuleCall) -> dict[str, Tensor | OuterProducts]:
        """What the rule gives for a module call, by parameter's name in the module."""
        if not call.rule.runs_module:
            with exactly(self.replay.probe.device):
                return dict(call.rule.function(call))
        with self.replay.conditions(), exactly(self.replay.probe.device):
            for module in call.module.modules():
                # Input and output were taken down next to the module itself, and what hooks keep should be of the user's
                # own passes. The conditions put them back.
                module.__dict__.update(_forward_hooks=OrderedDict(), _forward_pre_hooks=OrderedDict())
                module.__dict__.update(_backward_hooks=OrderedDict(), _backward_pre_hooks=OrderedDict())
            return dict(call.rule.function(call))

    def through_outputs(self, call: ModuleCall, names: list[str]) -> list[Tensor]:
        """The part of Dᵀu that comes to some of a module call's parameters through what it returned."""
        wanted = [call.aliases[name] for name in names]
        edges = list(call.edges.values())
        with self._backward_conditions():
            at_outputs = self._backward(self.replay.probe, edges)
            return list(torch.autograd.grad(edges, wanted, at_outputs, retain_graph=True, materialize_grads=True))

    def rows(self, outputs: range) -> list[ModuleCall]:
        """The module calls with B for some of the Q outputs of each sample, ``[N, len(outputs), ...]``."""
        edges = [edge for c in self.module_calls for edge in c.edges.values()]
        if not edges:
            return []
        layouts = [layout for c in self.module_calls for layout in c.layouts.values()]
        limit = _ELEMENTS_AT_ONCE if self._x.device.type == "cpu" else 2**40
        step = max(1, limit // max(1, self.elements))
        gradients: list[Tensor] = []
        with self._backward_conditions():
            for start in range(0, len(outputs), step):
                found = self._unit_backward(outputs[start : start + step], edges)
                parts = [
                    layout.samples_first(b, 1).transpose(0, 1).to(self._dtype) for b, layout in zip(found, layouts, strict=True)
                ]
                if step >= len(outputs):
                    gradients = parts
                    break
                if start == 0:
                    gradients = [b.new_empty(b.shape[0], len(outputs), *b.shape[2:]) for b in parts]
                for whole, part in zip(gradients, parts, strict=True):
                    whole[:, start : start + step] = part
        values = iter(gradients)
        return [dataclasses.replace(c, gradients={place: next(values) for place in c.layouts}) for c in self.module_calls]

    @contextlib.contextmanager
    def _backward_conditions(self) -> Iterator[None]:
        """Those of the call, but for autocast, which a user's backward pass does not run under either."""
        with self.replay.conditions(), torch.autocast(self._x.device.type, enabled=False):
            yield

    def _unit_backward(self, outputs: range, edges: list[Any]) -> list[Tensor]:
        """Gradients of Σ_i x_iq at the edges for a few q, ``[len(outputs), ...]`` each."""
        n, q = self.replay.n, self.replay.q
        units = torch.zeros(len(outputs), n, q, dtype=self._x.dtype, device=self._x.device)
        for row, output in enumerate(outputs):
            units[row, :, output] = 1
        units = units.reshape(len(outputs), n * q)
        if self._vectorized and len(outputs) > 1:
            try:
                return list(vmap(lambda u: self._gradients(u, edges))(units))
            except torch.OutOfMemoryError:
                raise
            except Exception:  # an operation without a batching rule, or a backward pass of the user's that does not like it
                self._vectorized = False
        rows = [self._gradients(u, edges) for u in units]
        return [parts[0][None] if len(rows) == 1 else torch.stack(parts) for parts in zip(*rows, strict=True)]

    def _gradients(self, u: Tensor, inputs: list[Any]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self._x, inputs, u, retain_graph=True)

    def _backward(self, u: Tensor, inputs: list[Any]) -> list[Tensor | None]:
        if not inputs:
            return []
        return list(torch.autograd.grad(self._x, inputs, u.to(self._x.dtype), retain_graph=True, allow_unused=True))

    def _find_layouts(
        self, calls: list[ModuleCall], plain: list[Tensor | None], scaled: list[Tensor | None], scale: Tensor
    ) -> None:
        """Find where each output has the samples; drop outputs that the model's do not depend on."""
        n = self.replay.n
        eps = precision(self.replay.call, self._x.dtype)
        noise = 4 * eps * max((float(g.norm()) for g in plain if g is not None), default=0.0)
        gradients = iter(zip(plain, scaled, strict=True))
        for c in calls:
            found = {place: next(gradients) for place in c.edges}
            reached = {place: (once, twice) for place, (once, twice) in found.items() if once is not None and twice is not None}
            c.edges = {place: c.edges[place] for place in reached}
            c.shapes = {place: c.shapes[place] for place in reached}
            for place, (once, twice) in reached.items():
                candidates = list(Layout.candidates(c.shapes[place], n, c.rule.dims(c.module, once.ndim)))
                fitting = (layout for layout in candidates if _scaled_by(scale, layout, once, twice, eps, noise))
                layout = next(fitting, None)
                if layout is not None:
                    c.layouts[place] = layout
                    c.gradients[place] = layout.samples_first(once).unsqueeze(1).to(self._dtype)
                    continue
                why = f"its output {list(c.shapes[place])} has no dimension of the batch size {n}"
                if candidates:
                    self.coupled = c
                    why = "samples interact behind it"
                self.unserved.update(dict.fromkeys(c.parameters.values(), f"{c}: {why}"))
                c.edges, c.layouts, c.gradients = {}, {}, {}
                break


def _scaled_by(scale: Tensor, layout: Layout, once: Tensor, twice: Tensor, eps: float, noise: float) -> bool:
    """Whether ``twice`` is ``once`` with each sample's part, as the layout has it, times the sample's entry of ``scale``."""
    expected = layout.samples_first(once)
    expected = expected * scale.to(expected.dtype).view(-1, *[1] * (expected.ndim - 1))
    return bool((layout.samples_first(twice) - expected).norm() <= min(1e3 * eps, 0.05) * expected.norm() + noise)


def _by_parameter(names: list[str], gradients: list[Tensor | None]) -> dict[str, Tensor]:
    """The sums over all uses of a parameter, of those that have any."""
    totals: dict[str, Tensor] = {}
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            dense = gradient.to_dense()
            totals[name] = totals[name] + dense if name in totals else dense
    return totals


@contextlib.contextmanager
def _watched(replay: Replay) -> Iterator[list[ModuleCall]]:
    """Take down the calls of modules that own any of the parameters, while the replay runs the model within.

    In each of these calls the module's parameters are replaced by leaves of their own, so that what reaches the
    parameters themselves came from elsewhere.
    """
    calls: list[ModuleCall] = []
    handles = []
    for name, module, rule, parameters in _units(replay.model, replay.names):
        watcher = _Watcher(replay, name, module, rule, parameters, calls)
        # Ours sees the inputs last and the outputs first, whatever hooks the user has.
        handles.append(module.register_forward_pre_hook(watcher.before, with_kwargs=True))
        handles.append(module.register_forward_hook(watcher.after, prepend=True, always_call=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _units(model: nn.Module, names: list[str]) -> Iterator[tuple[str, nn.Module, Rule, dict[str, str]]]:
    """The modules that own any of the parameters: name, module, rule, and the parameters' names in module and model."""
    wanted = set(names)
    by_id = {id(p): name for name, p in model.named_parameters() if name in wanted}
    covered: set[nn.Module] = set()
    for name, module in model.named_modules():
        rule = rule_for(module)
        if module in covered or isinstance(module, torch.jit.ScriptModule):
            continue  # a script's parameters are its own
        if module is model and rule.function is GENERIC.function:
            continue  # a model that is served as a whole: by its Jacobian
        if rule.whole:
            covered.update(module.modules())
            own = dict(module.named_parameters(remove_duplicate=False))
        else:
            own = {local: p for local, p in module._parameters.items() if p is not None}
        parameters = {local: by_id[id(p)] for local, p in own.items() if id(p) in by_id}
        if parameters:
            yield name, module, rule, parameters


class _Watcher:
    """The hooks of one module."""

    def __init__(
        self,
        replay: Replay,
        name: str,
        module: nn.Module,
        rule: Rule,
        parameters: dict[str, str],
        calls: list[ModuleCall],
    ) -> None:
        self._replay = replay
        self._name, self._rule, self._parameters = name, rule, parameters
        self._owners = {
            local: (module.get_submodule(local.rpartition(".")[0]), local.rpartition(".")[2]) for local in parameters
        }
        self._calls = calls
        self._running: list[tuple[ModuleCall, dict[str, Tensor]] | None] = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take down the inputs and put leaves in the parameters' places."""
        # In a derivative in the making, tensors are of no use later; and a module that calls itself is served as a whole.
        if torch._C._functorch.peek_interpreter_stack() is not None or self._running:
            self._running.append(None)
            return
        args, kwargs = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, (args, kwargs))
        buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
        call = ModuleCall(module, self._name, self._rule, {}, args, kwargs, buffers)
        before = {}
        for local, (owner, leaf) in self._owners.items():
            parameters: dict[str, Any] = owner._parameters
            value = parameters.get(leaf)
            if value is self._replay.given[self._parameters[local]]:  # else it was computed from what the model chose
                before[local] = value
                parameters[leaf] = call.aliases[local] = value.detach().requires_grad_()
                call.parameters[local] = self._parameters[local]
        self._running.append((call, before))

    def after(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """Put the parameters back and take down the outputs."""
        running = self._running.pop()
        if running is None:
            return
        call, before = running
        for local, value in before.items():
            owner, leaf = self._owners[local]
            parameters: dict[str, Any] = owner._parameters
            parameters[leaf] = value
        for place, leaf_output in enumerate(tree_leaves(output)):
            if isinstance(leaf_output, Tensor) and leaf_output.is_floating_point() and leaf_output.requires_grad:
                call.edges[place] = get_gradient_edge(leaf_output)
                call.shapes[place] = leaf_output.shape
                if call.rule.keeps_outputs:
                    call.outputs[place] = leaf_output.detach().clone()
        if call.parameters:
            self._calls.append(call)


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """No gradients, and no autocast."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield

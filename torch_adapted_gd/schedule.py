"""The change of time that makes the adapted flow a straight line (2.52)-(2.57), as a learning-rate scheduler."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .checks import positive_integer
from .policies import Fixed, LevenbergMarquardt
from .warning import warn_user


class LinearInterpolationLR(LRScheduler):
    """Moves the outputs from x₀ to the targets y on a straight line in ``total_steps`` equal steps of t.

    In the time t = 1 − e^{−s/N} the adapted flow reads ∂_t θ = −(1/(1−t)) D⁺(x − y) (2.55), and its outputs follow
    x̃(t) = (1−t) x₀ + t y (2.57). Explicit Euler with Δt = 1/T from t = k/T makes step k = 0..T−1 the fraction

        lr_k = lr / (T − k)

    of a full Gauss–Newton step; the last step is a full one. The outputs stay within O(1/T) of the line while the Jacobian has
    full rank. Call `step` after each step of the optimizer. After T steps the learning rate stays at ``lr``, and full steps
    hold the outputs at the targets.

    Args:
        optimizer: Usually `AdaptedGD` with ``lr=1.0``, ``criterion=`` and ``damping=0.0``. A damped step is shorter than the
            line asks; an `AdaptedWarning` says so if the damping is `LevenbergMarquardt`, the default with a criterion.
        total_steps: T, at least 1.
        last_epoch: Index of the last step made, when resuming without a state_dict; −1 at the start.

    Raises:
        TypeError: ``total_steps`` is not an integer.
        ValueError: ``total_steps`` is smaller than 1.

    Example:
        >>> import torch
        >>> from torch_adapted_gd import AdaptedGD, HalfSquaredLoss
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = AdaptedGD(model, criterion=HalfSquaredLoss(), damping=0.0)
        >>> scheduler = LinearInterpolationLR(optimizer, total_steps=4)
        >>> scheduler.get_last_lr(), scheduler.t
        ([0.25], 0.0)
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, last_epoch: int = -1) -> None:
        self.total_steps = positive_integer("total_steps", total_steps)
        policy = getattr(optimizer, "_policy", Fixed())
        if isinstance(policy, LevenbergMarquardt) or (policy is None and getattr(optimizer, "criterion", None)):
            warn_user(
                "Damped steps leave the straight line. Give AdaptedGD damping=0.0 to follow it: with a criterion, its default "
                "is LevenbergMarquardt()."
            )
        super().__init__(optimizer, last_epoch)

    @property
    def t(self) -> float:
        """The time t in [0, 1] reached so far: the part of the line that is behind."""
        return min(self.last_epoch / self.total_steps, 1.0)

    def get_lr(self) -> list[float]:  # type: ignore[override, unused-ignore]
        """The learning rate of each parameter group for the next step."""
        starts = [group.setdefault("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        return [float(lr) / max(self.total_steps - self.last_epoch, 1) for lr in starts]

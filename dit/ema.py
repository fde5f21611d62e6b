"""Averages of the weights: the exponential one that everyone keeps, and power-function ones, from which an average of
any length is built after the training ("post-hoc EMA", arXiv 2312.02696, section 3 and appendix C).

A power-function average after t updates weighs the weights of time tau by

    p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1),   0 <= tau <= t,

so that its length grows with the training. sigma_rel, the standard deviation of tau/t under p, names it to people.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SIGMA_REL_LIMIT = 12**-0.5  # gamma = 0: all weights since the beginning count alike


def decay_at(step: int, decay: float, warmup: bool) -> float:
    """The decay of update number `step` (0-based).

    Without warm-up it is constant, as DiT was trained. With it, min(decay, (1 + step) / (10 + step)): a short run's
    average would else be ruled by its random start.
    """
    return min(decay, (1 + step) / (10 + step)) if warmup else decay


@torch.no_grad()
def update(averages: Sequence[Tensor], weights: Sequence[Tensor], decay: float) -> None:
    """averages <- decay * averages + (1 - decay) * weights, in place, all tensors in one call."""
    torch._foreach_lerp_(list(averages), list(weights), 1 - decay)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power function with this relative width: the cubic's largest real root.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), so gamma^3 + 7 gamma^2 + (16 - s) gamma + 12 - s = 0 with
    s = sigma_rel^-2. Raises ValueError outside of 0 < sigma_rel < 0.2887.
    """
    if not 0 < sigma_rel < SIGMA_REL_LIMIT:
        raise ValueError(f"sigma_rel must be above 0 and below {SIGMA_REL_LIMIT:.4f}, got {sigma_rel}")
    s = sigma_rel**-2
    companion = torch.tensor([[-7, s - 16, s - 12], [1, 0, 0], [0, 1, 0]], dtype=torch.float64)
    return torch.linalg.eigvals(companion).real.max().item()


def sigma_rel_of(gamma: float) -> float:
    """The relative width of the power function with this exponent."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def power_decay_at(step: int, gamma: float) -> float:
    """The decay of a power-function average's update number `step` (0-based): (1 - 1/t)^(gamma + 1), t = step + 1.

    The first is 0: what the weights were before any update has no part in the average.
    """
    return (1 - 1 / (step + 1)) ** (gamma + 1)


def inner_products(steps: Tensor, gammas: Tensor, other_steps: Tensor, other_gammas: Tensor) -> Tensor:
    """Integrals of the product of two power functions each, (n, m) float64, for n of one and m of another kind.

    With t and gamma of the one that ends later, and u of the other:
    (gamma_1 + 1)(gamma_2 + 1) / ((gamma_1 + gamma_2 + 1) t) (u/t)^gamma.
    """
    t1, g1 = steps.double()[:, None], gammas.double()[:, None]
    t2, g2 = other_steps.double()[None], other_gammas.double()[None]
    earlier, later, gamma = torch.minimum(t1, t2), torch.maximum(t1, t2), torch.where(t1 > t2, g1, g2)
    return (g1 + 1) * (g2 + 1) / ((g1 + g2 + 1) * later) * (earlier / later) ** gamma


def mixture(kept: Sequence[tuple[int, float]], step: int, sigma_rel: float) -> tuple[Tensor, float]:
    """How the kept averages, each (step, sigma_rel), add up to the average of another width at `step`.

    Returns the factors (n,) float64, which sum to 1, and the relative error of the profile: 0 is exact, and where it is
    not small more averages have to be kept. The factors minimise the squared distance of the profiles (appendix C of
    the paper). That they sum to 1 is an addition: else weights that never change would come out scaled.
    """
    steps = torch.tensor([float(of_step) for of_step, _ in kept], dtype=torch.float64)
    gammas = torch.tensor([gamma_of(width) for _, width in kept], dtype=torch.float64)
    end = torch.tensor([float(step)], dtype=torch.float64), torch.tensor([gamma_of(sigma_rel)], dtype=torch.float64)
    products, wanted = inner_products(steps, gammas, steps, gammas), inner_products(steps, gammas, *end)[:, 0]
    ones = torch.ones(len(kept), 1, dtype=torch.float64)
    # The stationary point of |sum_i x_i p_i - p|^2 / 2 + multiplier (sum_i x_i - 1).
    system = torch.cat([torch.cat([products, ones], 1), torch.cat([ones.T, ones.new_zeros(1, 1)], 1)])
    x = torch.linalg.solve(system, torch.cat([wanted, wanted.new_ones(1)]))[: len(kept)]
    norm = inner_products(*end, *end).item()
    distance = x @ products @ x - 2 * x @ wanted + norm
    return x, math.sqrt(max(distance.item(), 0) / norm)

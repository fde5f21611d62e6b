"""Fast solvers for diffusion models, by diffusers' schedulers: DPM-Solver++ (arXiv 2211.01095) and UniPC (2302.04867).

They solve the same ordinary differential equation as deterministic DDIM, to second order: fewer steps, same weights.

The steps are ours: quadratic in time (arXiv 2010.02502, appendix D.2), and diffusers' own (even in time) are not used.
Measured on Gaussian data with the exact noise, error of the drawn spread relative to the data's at 20 steps of the
linear schedule, for spreads 0.1, 0.3, 1 and 2:

    DDIM, even                 42%    23%    10%    8%
    UniPC, even (diffusers')   47%    15%    0.1%   0.3%    fine detail is lost: the last step leaps from t = 50
    UniPC, even in log-SNR     0.7%   1.0%   1.0%   1.0%    but 42% and 53% at 5 steps of the cosine schedule
    UniPC, quadratic           3.6%   2.6%   0.7%   0.2%
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from dit import torchvision_cpu
from dit.diffusion import DiffusionConfig, chain
from dit.timesteps import NUM_TIMESTEPS

PREDICTIONS = {"epsilon": "epsilon", "x": "sample", "v": "v_prediction"}


def quadratic_steps(num_steps: int) -> list[int]:
    """So many different steps of the full chain, from the last to 0, with gaps that shrink in proportion to the root.

    One step alone is the last. Raises ValueError where there are fewer in the chain, or none are asked for.
    """
    if not 1 <= num_steps <= NUM_TIMESTEPS:
        raise ValueError(f"num_steps must be 1 to {NUM_TIMESTEPS}, got {num_steps}")
    last = NUM_TIMESTEPS - 1
    if num_steps == 1:
        return [last]
    # at least i: near 0, where the parabola is flat, no step is taken twice
    return [max(i, round(last * (i / (num_steps - 1)) ** 2)) for i in reversed(range(num_steps))]


def solve(
    name: Literal["dpmpp", "unipc"],
    model: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    config: DiffusionConfig,
    num_steps: int,
) -> Tensor:
    """Clean latents from noise x (N, C, H, W) in `num_steps` evaluations of the model.

    `model(x, t)` takes one step t of the full chain for the whole batch, a scalar tensor on the CPU; of its output
    the first C channels count. Raises ValueError for an unknown name and an impossible number of steps.
    """
    steps, bars = quadratic_steps(num_steps), chain(config).alphas_bar
    scheduler = _scheduler(name, config)
    scheduler.set_timesteps(num_steps, device="cpu")
    scheduler.timesteps = torch.tensor(steps)
    noise_to_signal = ((1 - bars[steps]) / bars[steps]).sqrt()
    scheduler.sigmas = torch.cat([noise_to_signal, noise_to_signal.new_zeros(1)]).float()  # on the CPU: read one by one
    scheduler.set_begin_index(0)  # else it looks the first step up, and the host waits for the device
    for t in scheduler.timesteps:
        output = model(x, t).float()[:, : x.shape[1]]
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


def _scheduler(name: str, config: DiffusionConfig) -> Any:
    """diffusers' scheduler, imported late: it takes seconds."""
    if name not in ("dpmpp", "unipc"):
        raise ValueError(f"there is no solver {name!r}: use dpmpp or unipc")
    torchvision_cpu.prepare()
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    kind = DPMSolverMultistepScheduler if name == "dpmpp" else UniPCMultistepScheduler
    return kind(
        num_train_timesteps=NUM_TIMESTEPS,
        trained_betas=chain(config).betas.numpy(),
        prediction_type=PREDICTIONS[config.prediction],
        solver_order=2,
        lower_order_final=True,  # the last step, to no noise at all, has no second order
        final_sigmas_type="zero",
    )

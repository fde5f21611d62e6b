"""One way to draw: which sampler with which options, and what fits what.

`num_steps` is each sampler's own: euler's, ddpm's, ddim's, dpmpp's and unipc's evaluations of the network; heun's steps
of two evaluations each; for sde_euler and sde_heun the last, noiseless step is one of them; dopri5 has none, its
tolerances decide.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from dit.timesteps import NUM_TIMESTEPS, space_timesteps

SAMPLERS = {
    "transport": ("euler", "heun", "dopri5", "sde_euler", "sde_heun"),
    "diffusion": ("ddpm", "ddim", "dpmpp", "unipc"),
}
_SDE = ("diffusion_form", "diffusion_norm", "last_step", "last_step_size")
OPTIONS = {  # what a sampler uses beside num_steps
    "euler": (),
    "heun": (),
    "dopri5": ("rtol", "atol"),
    "sde_euler": _SDE,
    "sde_heun": _SDE,
    "ddpm": ("spacing", "clip"),
    "ddim": ("spacing", "clip", "eta"),
    "dpmpp": (),
    "unipc": (),
}
GUIDANCE = ("cfg_channels", "cfg_interval")  # used where cfg_scale is not 1


@dataclass(frozen=True)
class Setting:
    """One way to draw. An option that its sampler does not use must be left at its default (see `require_sampler`)."""

    name: str
    cfg_scale: float
    sampler: Literal["euler", "heun", "dopri5", "sde_euler", "sde_heun", "ddpm", "ddim", "dpmpp", "unipc"]
    num_steps: int | None = None
    cfg_channels: Literal["all", "first3"] = "all"  # first3: as the published samples were drawn
    cfg_interval: tuple[float, float] = (0.0, 1.0)  # guided from .. to, in time: 0 noise, 1 data
    eta: float = 0.0  # 0 deterministic .. 1 as random as ddpm
    spacing: Literal["even", "stride"] = "even"  # even: both ends included; stride: every k-th step from 0
    diffusion_form: Literal[
        "constant", "sbdm", "sigma", "linear", "decreasing", "increasing_decreasing", "kl", "kl_eta"
    ] = "sigma"
    diffusion_norm: float = 1.0
    last_step: Literal["mean", "euler", "tweedie", "none"] = "mean"
    last_step_size: float = 0.04  # of the time from 0 to 1
    rtol: float = 1e-3
    atol: float = 1e-6
    clip: bool = False  # predicted latents held within [-1, 1]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cfg_interval", tuple(self.cfg_interval))  # JSON has lists only
        if not self.name or not all(c.isalnum() or c in "._-" for c in self.name) or self.name[0] in ".-":
            raise ValueError(f"name must be letters, digits, dots, dashes (it names a folder), got {self.name!r}")
        if self.sampler == "dopri5" and self.num_steps is not None:
            raise ValueError(
                f"num_steps must be null for dopri5, whose tolerances rtol and atol decide, got {self.num_steps}"
            )
        if self.sampler != "dopri5" and (self.num_steps is None or self.num_steps < 1):
            raise ValueError(f"num_steps must be at least 1 for {self.sampler}, got {self.num_steps}")
        if not 0 <= self.cfg_scale <= 100:
            raise ValueError(f"cfg_scale must be 0 to 100 (1 = no guidance), got {self.cfg_scale}")
        if len(self.cfg_interval) != 2 or not 0 <= self.cfg_interval[0] < self.cfg_interval[1] <= 1:
            raise ValueError(
                f"cfg_interval must be two times, 0 (noise) to 1 (data), the first below the second, got {list(self.cfg_interval)}"
            )
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be 0 (deterministic) to 1 (as random as ddpm), got {self.eta}")
        for name in ("rtol", "atol"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.diffusion_norm < 0:
            raise ValueError(f"diffusion_norm must not be negative, got {self.diffusion_norm}")
        if not 0 < self.last_step_size < 1:
            raise ValueError(f"last_step_size must be between 0 and 1, got {self.last_step_size}")


@dataclass(frozen=True)
class SampleConfig:
    """What to draw: so many images, with each of the named settings."""

    num_images: int
    seed: int
    labels: Literal["balanced", "random"]  # image i's class: i modulo the classes, or drawn by (seed, i)
    block_images: int  # images in one call of the network: part of the result to the last bit, so no hardware setting
    settings: tuple[Setting, ...]

    def __post_init__(self) -> None:
        if self.num_images < 1 or self.block_images < 1:
            raise ValueError(
                f"num_images and block_images must be at least 1, got {self.num_images} and {self.block_images}"
            )
        names = [setting.name for setting in self.settings]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"settings must be at least one, each with a name of its own, got {names}")


def changed(setting: Setting, **given: Any) -> Setting:
    """`setting` with other values; options that the new sampler, or no guidance, has no use for are put back.

    Raises ValueError where a value is none.
    """
    sampler, scale = given.get("sampler", setting.sampler), given.get("cfg_scale", setting.cfg_scale)
    used = (
        *OPTIONS.get(sampler, ()),
        *(GUIDANCE if scale != 1 else ()),
        *(["num_steps"] if sampler != "dopri5" else []),
    )
    unused = {name: default for name, default in _defaults().items() if name not in used}
    return replace(setting, **{**unused, **given})


def require_sampler(setting: Setting, objective: str, conditional: bool | int) -> None:
    """Raise ValueError, one line, unless a model of this objective can be drawn from with this setting.

    `conditional`: whether the model takes classes (their number will do) or embeddings.
    """
    where = f"sample.settings {setting.name!r}"
    if setting.sampler not in SAMPLERS[objective]:
        allowed = _either(SAMPLERS[objective])
        raise ValueError(f"{where}: sampler {setting.sampler!r} does not fit objective {objective!r}: use {allowed}")
    if setting.sampler in SAMPLERS["diffusion"] and not 2 <= setting.num_steps <= NUM_TIMESTEPS:
        raise ValueError(
            f"{where}: num_steps must be 2 to {NUM_TIMESTEPS} for {setting.sampler}, got {setting.num_steps}"
        )
    if not conditional and setting.cfg_scale != 1:
        raise ValueError(f"{where}: an unconditional model has nothing to guide: set cfg_scale to 1")
    for name, default in _defaults().items():
        if name == "num_steps" or getattr(setting, name) == default:
            continue
        if name in GUIDANCE and setting.cfg_scale == 1:
            raise ValueError(f"{where}: {name} is for guidance, and cfg_scale 1 is none: leave {name} out")
        if name not in (*GUIDANCE, *OPTIONS[setting.sampler]):
            users = _either([sampler for sampler, options in OPTIONS.items() if name in options])
            raise ValueError(f"{where}: {name} is for {users}, {setting.sampler} has no use for it: leave it out")
    if setting.last_step == "none" and setting.last_step_size != _defaults()["last_step_size"]:
        raise ValueError(f"{where}: last_step none has no size: leave last_step_size out")
    if setting.sampler in ("sde_euler", "sde_heun") and setting.last_step != "none" and setting.num_steps < 2:
        raise ValueError(
            f"{where}: num_steps must be at least 2, the last of them is last_step, got {setting.num_steps}"
        )
    if setting.spacing == "stride":
        try:
            space_timesteps(NUM_TIMESTEPS, respacing(setting))
        except ValueError as error:
            raise ValueError(f"{where}: spacing stride: {error}: take another num_steps, or spacing even") from None


def terms_of(setting: Setting) -> dict[str, Any]:
    """What decides the images: all but the name, without the options that are at their defaults, so that an option
    that is invented later makes no other setting of this one."""
    defaults = {**_defaults(), "name": setting.name}
    return {name: value for name, value in asdict(setting).items() if (name, value) not in defaults.items()}


def respacing(setting: Setting) -> str:
    """The steps that ddpm and ddim visit, as `timesteps.space_timesteps` takes them."""
    return f"ddim{setting.num_steps}" if setting.spacing == "stride" else str(setting.num_steps)


def _defaults() -> dict[str, Any]:
    return {field.name: field.default for field in fields(Setting)[3:]}


def _either(names: Sequence[str]) -> str:
    return " or ".join(", ".join(names).rsplit(", ", 1))

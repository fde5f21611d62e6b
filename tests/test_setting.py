"""What may be asked of a sampler, and what is refused."""

import pytest

from dit.config import parse
from dit.setting import OPTIONS, SAMPLERS, SampleConfig, Setting, changed, require_sampler, terms_of

OBJECTIVE = {sampler: objective for objective, samplers in SAMPLERS.items() for sampler in samplers}


def of(sampler, num_steps=10, cfg_scale=1.5, **options):
    return Setting("s", cfg_scale, sampler, None if sampler == "dopri5" else num_steps, **options)


@pytest.mark.parametrize("sampler", OPTIONS)
def test_a_sampler_fits_its_own_objective_alone(sampler):
    require_sampler(of(sampler), OBJECTIVE[sampler], 10)
    other = next(name for name in SAMPLERS if name != OBJECTIVE[sampler])
    with pytest.raises(ValueError, match=f"^sample.settings 's': sampler '{sampler}' does not fit objective '{other}'"):
        require_sampler(of(sampler), other, 10)


OTHER_VALUES = {
    "eta": 0.5,
    "spacing": "stride",
    "clip": True,
    "diffusion_form": "linear",
    "diffusion_norm": 0.5,
    "last_step": "euler",
    "last_step_size": 0.1,
    "rtol": 1e-4,
    "atol": 1e-5,
}


@pytest.mark.parametrize("sampler", OPTIONS)
def test_an_option_is_taken_by_its_samplers_and_refused_by_the_others(sampler):
    assert {option for options in OPTIONS.values() for option in options} == set(OTHER_VALUES)
    for option, value in OTHER_VALUES.items():
        setting = of(sampler, **{option: value})
        if option in OPTIONS[sampler]:
            require_sampler(setting, OBJECTIVE[sampler], 10)
        else:
            with pytest.raises(
                ValueError, match=f"^sample.settings 's': {option} is for .*, {sampler} has no use for it"
            ):
                require_sampler(setting, OBJECTIVE[sampler], 10)


@pytest.mark.parametrize(
    ("setting", "conditional", "said"),
    [
        (of("heun"), 0, "an unconditional model has nothing to guide: set cfg_scale to 1"),
        (of("heun", cfg_scale=1, cfg_channels="first3"), 3, "cfg_channels is for guidance, and cfg_scale 1 is none"),
        (of("ddim", cfg_scale=1, cfg_interval=(0.1, 1)), 3, "cfg_interval is for guidance, and cfg_scale 1 is none"),
        (of("ddpm", 1001), 3, "num_steps must be 2 to 1000 for ddpm, got 1001"),
        (of("unipc", 1), 3, "num_steps must be 2 to 1000 for unipc, got 1"),
        (of("ddim", 300, spacing="stride"), 3, "spacing stride: no whole stride gives 300 of 1000 steps: take another"),
        (of("sde_euler", 1), 3, "num_steps must be at least 2, the last of them is last_step, got 1"),
        (of("sde_heun", last_step="none", last_step_size=0.1), 3, "last_step none has no size: leave last_step_size"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(setting, conditional, said):
    with pytest.raises(ValueError) as caught:
        require_sampler(setting, OBJECTIVE[setting.sampler], conditional)
    assert str(caught.value).startswith("sample.settings 's': ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_sde_of_one_step_is_allowed_where_it_has_no_last_one():
    require_sampler(of("sde_euler", 1, last_step="none"), "transport", 3)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"name": "../x"}, "name must be letters"),
        ({"num_steps": 0}, "num_steps must be at least 1 for heun, got 0"),
        ({"num_steps": None}, "num_steps must be at least 1 for heun, got None"),
        ({"sampler": "dopri5"}, "num_steps must be null for dopri5"),
        ({"cfg_scale": -1}, "cfg_scale must be 0 to 100"),
        ({"cfg_interval": (0.5, 0.5)}, "cfg_interval must be two times"),
        ({"cfg_interval": (0.5,)}, "cfg_interval must be two times"),
        ({"cfg_interval": (0, 1.5)}, "cfg_interval must be two times"),
        ({"eta": 2}, "eta must be 0"),
        ({"rtol": 0}, "rtol must be above 0"),
        ({"diffusion_norm": -1}, "diffusion_norm must not be negative"),
        ({"last_step_size": 1}, "last_step_size must be between 0 and 1"),
    ],
)
def test_values_out_of_range_begin_with_the_fields_name(values, said):
    with pytest.raises(ValueError) as caught:
        Setting(**{"name": "s", "cfg_scale": 1.0, "sampler": "heun", "num_steps": 5, **values})
    assert str(caught.value).startswith(said)


def test_params_yaml_says_it_all():
    told = {"num_images": 10, "seed": 0, "labels": "balanced", "block_images": 4}
    free = {"name": "free", "cfg_scale": 2, "sampler": "dopri5", "num_steps": None, "rtol": 1e-4}
    inner = {"name": "inner", "cfg_scale": 2, "sampler": "heun", "num_steps": 8, "cfg_interval": [0.2, 0.9]}
    config = parse("sample", {**told, "settings": [free, inner]}, SampleConfig)
    assert config.settings[0] == Setting("free", 2.0, "dopri5", rtol=1e-4)
    assert config.settings[1].cfg_interval == (0.2, 0.9)
    with pytest.raises(ValueError, match=r"^sample.settings.0.sampler: .* got 'rk4'"):
        parse("sample", {**told, "settings": [{**inner, "sampler": "rk4"}]}, SampleConfig)
    with pytest.raises(ValueError, match=r"^sample.settings.0.num_steps must be at least 1 for heun"):
        parse("sample", {**told, "settings": [{**inner, "num_steps": None}]}, SampleConfig)
    with pytest.raises(ValueError, match="each with a name of its own"):
        SampleConfig(10, 0, "balanced", 4, (config.settings[0], config.settings[0]))


def test_another_sampler_puts_the_options_of_the_old_one_back():
    noisy = of("sde_euler", 40, cfg_interval=(0.2, 1), diffusion_form="linear")
    assert changed(noisy, sampler="heun", num_steps=5) == of("heun", 5, cfg_interval=(0.2, 1))
    assert changed(noisy, sampler="dopri5") == of("dopri5", cfg_interval=(0.2, 1))
    assert changed(noisy, cfg_scale=1.0) == of("sde_euler", 40, 1.0, diffusion_form="linear")
    assert changed(noisy, last_step="none").diffusion_form == "linear"
    assert changed(of("dopri5", rtol=0.1), atol=1.0) == of("dopri5", rtol=0.1, atol=1.0)
    with pytest.raises(ValueError, match="num_steps must be at least 1 for heun, got None"):
        changed(of("dopri5"), sampler="heun")


def test_what_is_told_of_a_setting_leaves_defaults_and_its_name_out():
    assert terms_of(of("heun")) == {"cfg_scale": 1.5, "sampler": "heun", "num_steps": 10}
    assert terms_of(of("dopri5", rtol=0.1)) == {"cfg_scale": 1.5, "sampler": "dopri5", "rtol": 0.1}
    assert Setting("other", **terms_of(of("ddim", eta=0.5))) == Setting("other", 1.5, "ddim", 10, eta=0.5)

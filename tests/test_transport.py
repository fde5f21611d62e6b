import json
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from gaussian_flow import GaussianFlow
from hypothesis import given, settings
from hypothesis import strategies as st

from dit import transport
from dit.transport import PATHS, TransportConfig, interpolate, interval, sample_times, training_interval, training_loss

NAMES = {"linear": "Linear", "gvp": "GVP", "vp": "VP"}
PREDICTIONS = ("velocity", "score", "noise")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-7}
path = pytest.mark.parametrize("path", NAMES)
prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


@path
def test_path_equals_the_reference(golden, path):
    g, _ = golden("sit_transport_terms")
    for name, value in zip(("alpha", "sigma", "d_alpha", "d_sigma"), PATHS[path](g["t_grid"]), strict=True):
        expected = g[f"{NAMES[path]}.{name}"]
        torch.testing.assert_close(value[:-1], expected[:-1], **TOLERANCE)
        # at t = 0.999 the reference's VP sigma is sqrt(1 - alpha^2) in float32, which cancels
        torch.testing.assert_close(value[-1], expected[-1], rtol=2e-4 if path == "vp" else 1e-5, atol=1e-7)
        exact = dict(zip(("alpha", "sigma", "d_alpha", "d_sigma"), PATHS[path](g["t_grid"].double()), strict=True))
        torch.testing.assert_close(value.double(), exact[name], rtol=2e-6 if path == "vp" else 1e-4, atol=1e-7)
    gain = transport.score_gain(path, g["t_grid"])
    torch.testing.assert_close(gain, g[f"{NAMES[path]}.drift_diffusion"][:, 0], **TOLERANCE)


@path
def test_interpolants_and_conversions_equal_the_reference(golden, path):
    g, _ = golden("sit_transport_terms")
    x, noise, t, output = g["x1"], g["x0"], g["t"], g["fake_out"]
    x_t, target = interpolate(x, noise, t, path)
    found = {
        "xt": x_t,
        "ut": target,
        "score_from_velocity": transport.score_from_velocity(output, x_t, t, path),
        "noise_from_velocity": transport.noise_from_velocity(output, x_t, t, path),
        "velocity_from_score": transport.velocity_from_score(output, x_t, t, path),
    }
    for prediction in PREDICTIONS:
        found[f"{prediction}.ode_drift"] = transport.to_velocity(output, x_t, t, TransportConfig(path, prediction))
        found[f"{prediction}.score"] = transport.to_score(output, x_t, t, TransportConfig(path, prediction))
    for name, value in found.items():
        torch.testing.assert_close(value[:, :, 0, 0], g[f"{NAMES[path]}.{name}"], **TOLERANCE, msg=name)


@path
@prediction
def test_losses_equal_the_reference(golden, path, prediction):
    g, _ = golden("sit_transport_terms")
    for weighting in ["uniform"] if prediction == "velocity" else ["uniform", "velocity", "likelihood"]:
        config = TransportConfig(path, prediction, weighting)
        loss = training_loss(lambda x_t, t, y: g["fake_out"], g["x1"], None, g["t"], g["x0"], config)
        told = "None" if weighting == "uniform" else weighting
        torch.testing.assert_close(loss, g[f"{NAMES[path]}.{prediction}.{told}.loss"], **TOLERANCE)


@path
@prediction
def test_intervals_equal_the_reference(path, prediction):
    told = json.loads((Path(__file__).parent / "golden" / "sit_intervals.json").read_text())[
        f"{NAMES[path]}.{prediction}"
    ]
    config = TransportConfig(path, prediction)
    assert training_interval(config) == tuple(told["train"])
    assert interval(config) == tuple(told["ode"])
    if path != "vp":  # whose published reverse is another interval
        assert interval(config)[::-1] == pytest.approx(told["ode_reverse"])


def test_the_default_loss_is_the_plain_one_to_the_last_bit(golden):
    g, _ = golden("sit_transport_terms")
    x, noise, t, output = g["x1"], g["x0"], g["t"], g["fake_out"]
    s = t.view(-1, 1, 1, 1)
    seen = []
    loss = training_loss(lambda x_t, t, y: seen.append(x_t) or output, x, None, t, noise)
    assert torch.equal(seen[0], s * x + (1 - s) * noise)
    assert torch.equal(loss, (output - (x - noise)).square().mean(dim=(1, 2, 3)))
    uniform = torch.rand(100)
    assert torch.equal(sample_times(uniform), uniform)


def test_learned_sigma_channels_are_dropped(golden):
    g, _ = golden("sit_transport_terms")
    twice = torch.cat([g["fake_out"], torch.full_like(g["x1"], 1e6)], dim=1)
    for prediction in PREDICTIONS:
        config = TransportConfig("vp", prediction)
        loss = training_loss(lambda x_t, t, y: twice, g["x1"], None, g["t"], g["x0"], config)
        torch.testing.assert_close(loss, g[f"VP.{prediction}.None.loss"], **TOLERANCE)
        for convert in (transport.velocity_of, transport.score_of):
            assert convert(lambda x, t: twice, config, 4)(g["x1"], torch.tensor(0.5)).shape == g["x1"].shape


@path
def test_the_velocity_is_the_derivative_of_the_path(path):
    x, noise, h = torch.randn(6, 2, 4, 4).double(), torch.randn(6, 2, 4, 4).double(), 1e-6
    t = torch.linspace(0.05, 0.95, 6).double()
    difference = (interpolate(x, noise, t + h, path)[0] - interpolate(x, noise, t - h, path)[0]) / (2 * h)
    torch.testing.assert_close(difference, interpolate(x, noise, t, path)[1], rtol=1e-6, atol=1e-7)


@path
def test_paths_go_from_noise_to_data(path):
    alpha_t, sigma_t, _, _ = PATHS[path](torch.tensor([0.0, 1.0]))
    assert alpha_t.tolist() == pytest.approx([0, 1], abs=7e-3 if path == "vp" else 1e-7)
    assert sigma_t.tolist() == pytest.approx([1, 0], abs=3e-5 if path == "vp" else 1e-7)


@path
@prediction
def test_each_prediction_of_gaussian_data_means_the_same_velocity_and_score(path, prediction):
    """The expectations are derived from Bayes' rule, not from the conversions."""
    data, x = GaussianFlow(path), torch.randn(5, 2, 1, 1, dtype=torch.float64)
    for t in torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64):
        velocity = transport.velocity_of(data.network(prediction), data.config(prediction), 2)(x, t)
        score = transport.score_of(data.network(prediction), data.config(prediction), 2)(x, t)
        torch.testing.assert_close(velocity, data.answer("velocity", x, t))
        torch.testing.assert_close(score, data.answer("score", x, t))


times = st.floats(0.02, 0.98)


@settings(max_examples=15, deadline=None)
@given(path=st.sampled_from(list(NAMES)), t=times, seed=st.integers(0, 99))
def test_conversions_round_trip(path, t, seed):
    generator = torch.Generator().manual_seed(seed)
    velocity, x_t = torch.randn(2, 3, 4, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.full((3,), t, dtype=torch.float64)
    noise = transport.noise_from_velocity(velocity, x_t, t, path)
    score = transport.score_from_velocity(velocity, x_t, t, path)
    torch.testing.assert_close(transport.score_from_noise(noise, t, path), score)
    for output, prediction in ((velocity, "velocity"), (noise, "noise"), (score, "score")):
        config = TransportConfig(path, prediction)
        torch.testing.assert_close(transport.to_velocity(output, x_t, t, config), velocity)
        torch.testing.assert_close(transport.to_score(output, x_t, t, config), score)


@settings(max_examples=15, deadline=None)
@given(path=st.sampled_from(list(NAMES)), t=times, seed=st.integers(0, 99))
def test_the_weighted_error_of_noise_or_score_is_the_velocitys(path, t, seed):
    generator = torch.Generator().manual_seed(seed)
    velocity, x, noise = torch.randn(3, 2, 3, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.full((2,), t, dtype=torch.float64)
    x_t, target = interpolate(x, noise, t, path)
    expected = (velocity - target).square().mean(dim=(1, 2, 3))
    for prediction, convert in (("noise", transport.noise_from_velocity), ("score", transport.score_from_velocity)):
        told = convert(velocity, x_t, t, path)
        config = TransportConfig(path, prediction, "velocity")
        loss = training_loss(lambda x_t, t, y, told=told: told.double(), x, None, t, noise, config)
        torch.testing.assert_close(loss, expected, rtol=2e-4, atol=1e-6)  # the loss is taken in float32
    by_velocity, by_likelihood = (
        transport.weight(TransportConfig(path, "noise", name), t) for name in ("velocity", "likelihood")
    )
    torch.testing.assert_close(by_velocity, by_likelihood * transport.score_gain(path, t))


def test_logit_normal_times_have_their_quantiles():
    uniform = torch.linspace(0.01, 0.99, 99)
    t = sample_times(uniform, TransportConfig(times="logit_normal", logit_mean=-0.5, logit_std=1.3))
    normal = NormalDist(-0.5, 1.3)
    expected = torch.tensor([normal.inv_cdf(u) for u in uniform.tolist()]).sigmoid()
    torch.testing.assert_close(t, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
@path
@prediction
def test_times_stay_in_the_training_interval(path, prediction, law):
    config = TransportConfig(path, prediction, times=law)
    t = sample_times(torch.tensor([0.0, 1e-7, 0.5, 1 - 2**-24]), config)
    low, high = training_interval(config)
    assert t.min() >= torch.tensor(low) and t.max() <= torch.tensor(high) and (t.diff() >= 0).all()
    x, noise = torch.randn(2, 4, 2, 2, 2)
    x_t, _ = interpolate(x, noise, t, path)
    loss = training_loss(lambda x_t, t, y: x_t, x, None, t, noise, config)
    assert x_t.isfinite().all() and loss.isfinite().all()


def test_a_network_that_predicts_0_gets_a_bounded_gradient_of_the_direction():
    x, noise, output = torch.randn(3, 2, 4, 4, 4).unbind(0)
    output = torch.zeros_like(output, requires_grad=True)
    config = TransportConfig(direction_weight=1.0)
    training_loss(lambda x, t, y: output, x, None, torch.full((2,), 0.5), noise, config).sum().backward()
    per_position = output.grad.norm(dim=1) * 16  # the loss is a mean over 4 x 4 positions
    assert 0 < per_position.max() < 1 / 0.1 + 2 * 10


def test_the_direction_term_is_the_cosine_along_channels():
    x, noise, t = torch.randn(3, 4, 2, 2).sign(), torch.randn(3, 4, 2, 2) + 3, torch.rand(3)
    target = interpolate(x, noise, t)[1]
    both, plain = TransportConfig(direction_weight=0.5), TransportConfig()

    def term(output):
        return training_loss(lambda *_: output, x, None, t, noise, both) - training_loss(
            lambda *_: output, x, None, t, noise, plain
        )

    positions = torch.rand(3, 1, 2, 2) + 1  # long enough to have a direction (SMALL_NORM)
    torch.testing.assert_close(term(positions * target), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(term(-positions * target), torch.ones(3), atol=1e-5, rtol=0)
    turned = target[:, [1, 0, 3, 2]] * torch.tensor([1.0, -1.0, 1.0, -1.0]).view(1, 4, 1, 1)  # at a right angle
    torch.testing.assert_close(term(turned), torch.full((3,), 0.5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "setting,words",
    [
        ({"weighting": "velocity"}, "prediction score or noise"),
        ({"prediction": "noise", "direction_weight": 1.0}, "needs prediction velocity"),
        ({"direction_weight": -1.0}, "0 or more"),
        ({"logit_std": 0.0}, "logit_std must be positive"),
        ({"logit_mean": -0.5}, "for times logit_normal: leave them at 0 and 1 with uniform"),
        ({"logit_std": 2.0}, "for times logit_normal"),
    ],
)
def test_settings_without_a_meaning_are_refused(setting, words):
    with pytest.raises(ValueError, match=words):
        TransportConfig(**setting)

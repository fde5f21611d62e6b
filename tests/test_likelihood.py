import pytest
import torch
from gaussian_flow import GaussianFlow

from dit.likelihood import divergence, log_likelihood, rademacher, standard_normal
from dit.sampling import dopri5, euler, heun
from dit.transport import interval, velocity_of


def test_the_priors_density_equals_the_reference(golden):
    g, _ = golden("sit_transport_terms")
    torch.testing.assert_close(standard_normal(g["prior.z"]), g["prior.logp"], rtol=1e-5, atol=0)


def gaussian_data(path, prediction="velocity"):
    """A flow, data (5, 2, 3, 3), its exact log density, and the times back to noise."""
    flow = GaussianFlow(path)
    mean, spread = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (flow.means, flow.spreads))
    x = mean + spread * torch.randn(5, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = torch.distributions.Normal(mean, spread).log_prob(x).sum(dim=(1, 2, 3))
    config = flow.config(prediction)
    return velocity_of(flow.network(prediction), config, 2), x, exact, interval(config)[::-1]


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise"])
def test_the_likelihood_of_gaussian_data_is_the_exact_one(path, prediction):
    velocity, x, exact, ends = gaussian_data(path, prediction)
    found = log_likelihood(velocity, x, torch.linspace(*ends, 101, dtype=torch.float64), rademacher(x))
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=0)


def test_an_adaptive_solver_takes_signs_that_are_drawn_once():
    velocity, x, exact, ends = gaussian_data("linear")
    signs = rademacher(x)()

    def solver(rate, state, times):
        return dopri5(rate, state, times[0].item(), times[-1].item(), 1e-6, 1e-6)

    found = log_likelihood(velocity, x, torch.tensor(ends), lambda: signs, solver)
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=0)


def test_hutchinsons_estimate_is_the_trace_on_average():
    """A field that mixes all dimensions: the estimate is unbiased; where its Jacobian is diagonal, exact."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(1, 6, generator=generator, dtype=torch.float64).expand(20000, 6)
    signs = rademacher(x, generator)()
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    v, estimate = divergence(lambda x, t: (x @ matrix.T).sin(), x, torch.tensor(0.0), signs)
    slopes = (x[0] @ matrix.T).cos()
    spread = estimate.std() / 20000**0.5
    assert spread > 0 and abs(estimate.mean() - (slopes * matrix.diagonal()).sum()) < 4 * spread
    torch.testing.assert_close(v, (x @ matrix.T).sin())
    _, exact = divergence(lambda x, t: x**2, x, torch.tensor(0.0), signs)
    torch.testing.assert_close(exact, 2 * x.sum(dim=1))


@pytest.mark.parametrize("solver,evaluations", [(euler, 6), (heun, 12)])
def test_signs_are_redrawn_at_every_evaluation_and_no_grad_changes_nothing(golden_network, solver, evaluations):
    network, g = golden_network("sit_ode")
    calls = []

    def signs(source):
        return lambda: calls.append(1) or source()

    def velocity(x, t):
        return network(x, t.expand(len(x)), g["y"])

    def found():
        source = rademacher(g["z"], torch.Generator().manual_seed(3))
        return log_likelihood(velocity, g["z"], torch.linspace(1, 0, 7), signs(source), solver)

    with torch.no_grad():
        quiet = found()
    assert len(calls) == evaluations
    loud = found()
    assert torch.equal(quiet, loud) and not loud.requires_grad and loud.shape == (2,)
    assert all(p.grad is None for p in network.parameters())

import json

import pytest
import torch

from dit.checkpoint import TrainingState, save_tensors
from dit.latents import LatentDataset
from dit.model import DiT, ModelConfig
from dit.runtime import RunConfig
from dit.trainer import ObjectiveConfig, TrainConfig, fit, mathematics, require_objective, step_inputs

RUN = RunConfig(log_every_steps=3, checkpoint_every_steps=4)
TRANSPORT, DIFFUSION = ObjectiveConfig("transport"), ObjectiveConfig("diffusion")


def settings(**changes):
    return TrainConfig(**{"max_steps": 10, "global_batch_size": 8, "lr": 1e-2, "warmup_steps": 2, **changes})


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encode")
    torch.manual_seed(0)
    label = torch.arange(40) % 3
    mean = label.view(-1, 1, 1, 1) - 1 + 0.1 * torch.randn(40, 2, 4, 4)
    tensors = {"mean": mean.half(), "std": torch.full_like(mean, 0.1).half(), "label": label}
    save_tensors(folder / "a.safetensors", tensors)
    index = {"shards": [{"file": "a.safetensors", "split": "train", "sha256": ""}], "classes": list("abc")}
    index["normalization"] = {"mean": [0.0, 0.0], "std": [1.0, 1.0]}
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def new_network(seed=0):
    torch.manual_seed(seed)
    return DiT(ModelConfig("custom", 2, 16, 1, 2), input_size=4, in_channels=2, num_classes=3)


def train(latents, config, objective=TRANSPORT, run=RUN, **options):
    return fit(
        new_network(), LatentDataset(latents, config.seed, config.global_batch_size), objective, config, run, **options
    )


def assert_same(a: TrainingState, b: TrainingState):
    assert a.step == b.step and a.values == b.values and a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert torch.equal(a.tensors[name], b.tensors[name]), name


@pytest.mark.parametrize("objective", [TRANSPORT, DIFFUSION])
@pytest.mark.parametrize("stop", [1, 3, 4, 9])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(latents, objective, stop):
    whole = train(latents, settings(), objective)
    asked = []
    half = train(latents, settings(), objective, should_stop=lambda: len(asked) + 1 == stop or asked.append(1))
    assert half.step == stop
    torch.manual_seed(12345)  # whatever happened between the two processes
    torch.rand(7)
    assert_same(train(latents, settings(), objective, resume=half), whole)


def test_every_saved_state_can_be_resumed_from(latents):
    saved = []
    whole = train(latents, settings(), save=saved.append)
    assert [state.step for state in saved] == [4, 8, 10]
    for state in saved:
        assert_same(train(latents, settings(), resume=state), whole)


def test_raising_max_steps_continues_a_constant_rate(latents):
    half, whole = train(latents, settings(max_steps=6)), train(latents, settings(max_steps=12))
    assert_same(train(latents, settings(max_steps=12), resume=half), whole)
    network = new_network()
    assert mathematics(network, TRANSPORT, settings(max_steps=6), "x") == mathematics(
        network, TRANSPORT, settings(), "x"
    )
    cosine = [mathematics(network, TRANSPORT, settings(max_steps=n, lr_schedule="cosine"), "x") for n in (6, 12)]
    assert cosine[0] != cosine[1]


def test_what_changes_the_weights_changes_the_name(latents):
    names = {
        mathematics(new_network(), TRANSPORT, settings(**c), "x")
        for c in ({}, {"lr": 1e-3}, {"seed": 1}, {"ema_decay": 0.5})
    }
    names |= {
        mathematics(new_network(), DIFFUSION, settings(), "x"),
        mathematics(new_network(), TRANSPORT, settings(), "y"),
    }
    assert len(names) == 6


@pytest.mark.parametrize("objective", [TRANSPORT, DIFFUSION])
def test_device_batches_change_only_the_rounding(latents, objective):
    whole = train(latents, settings(), objective)
    for size in (1, 3, 4):
        run = RunConfig(log_every_steps=3, device_batch_size=size)
        parts = train(latents, settings(), objective, run=run)
        for (_, a, _), (_, b, _) in zip(whole.values["rows"], parts.values["rows"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_it_learns(latents):
    state = train(latents, settings(max_steps=300, lr=3e-3), run=RunConfig(log_every_steps=50))
    losses = [loss for _, loss, _ in state.values["rows"]]
    assert losses[-1] < 0.7 * losses[0]


def test_previews_draw_no_training_randomness_and_see_the_average(latents):
    seen = []

    def observe(step, average):
        network = average()
        torch.rand(100)
        seen.append((step, network.blocks[0].attn.qkv.weight.clone()))

    run = RunConfig(log_every_steps=3, checkpoint_every_steps=4, preview_every_steps=4)
    observed = train(latents, settings(), run=run, observe=observe)
    assert_same(observed, train(latents, settings()))
    assert [step for step, _ in seen] == [4, 8, 10]
    assert torch.equal(seen[-1][1], observed.tensors["ema.blocks.0.attn.qkv.weight"])


def test_an_infinite_loss_stops_with_its_step_and_saves_nothing(latents):
    saved = []
    with pytest.raises(
        ValueError, match=r"train.lr: the loss is not finite at step \d+, nothing of it was saved"
    ) as caught:
        train(latents, settings(lr=9.9, betas=(0.0, 0.0), max_steps=400, warmup_steps=0), save=saved.append)
    assert "\n" not in str(caught.value)
    assert saved
    weights = [t for state in saved for name, t in state.tensors.items() if name.startswith(("model.", "ema."))]
    assert all(torch.isfinite(weight).all() for weight in weights)


def test_bf16_follows_fp32(latents):
    fp32 = train(latents, settings(max_steps=30)).values["rows"]
    bf16 = train(latents, settings(max_steps=30, precision="bf16")).values["rows"]
    assert [row[1] for row in bf16] == pytest.approx([row[1] for row in fp32], rel=0.03)


def test_the_inputs_of_a_step(latents):
    data = LatentDataset(latents, 0, 4000)
    inputs = step_inputs(data.batch(0), data, new_network(), TRANSPORT, settings(class_dropout_prob=0.25), 0)
    dropped = (inputs["y"] == 3).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.03)
    kept = inputs["y"] != 3
    assert torch.equal(inputs["y"][kept], data.batch(0)["label"][kept])
    assert (
        0 <= inputs["t"].min() and inputs["t"].max() <= 1 and inputs["t"].mean().item() == pytest.approx(0.5, abs=0.03)
    )
    steps = step_inputs(data.batch(0), data, new_network(), DIFFUSION, settings(), 0)["t"]
    assert steps.dtype == torch.long and steps.min() >= 0 and steps.max() == 999
    again = step_inputs(data.batch(0), data, new_network(), TRANSPORT, settings(class_dropout_prob=0.25), 0)
    assert all(torch.equal(inputs[k], again[k]) for k in inputs)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"lr": 0}, "lr must be above 0"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"ema_decay": 1.5}, "ema_decay must be between"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


def test_diffusion_needs_learned_sigma():
    with pytest.raises(ValueError, match="model.learn_sigma must be true"):
        require_objective(ModelConfig("custom", 2, 16, 1, 2, learn_sigma=False), DIFFUSION)


def test_matches_the_plain_recipe_written_out(latents):
    """One step of AdamW and EMA as the paper's recipe says, against plain torch."""
    config = settings(max_steps=1, warmup_steps=0, ema_decay=0.9)
    state = train(latents, config)
    network = new_network()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    data = LatentDataset(latents, 0, 8)
    inputs = step_inputs(data.batch(0), data, network, TRANSPORT, config, 0)
    x, y, t, noise = (inputs[k] for k in ("x", "y", "t", "noise"))
    x_t = t.view(-1, 1, 1, 1) * x + (1 - t.view(-1, 1, 1, 1)) * noise
    loss = (network(x_t, t, y)[:, :2] - (x - noise)).pow(2).mean()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    loss.backward()
    optimizer.step()
    assert state.values["rows"][0][1] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(state.tensors[f"model.{name}"], parameter.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            state.tensors[f"ema.{name}"], 0.9 * before[name] + 0.1 * parameter.detach(), rtol=1e-4, atol=1e-5
        )

import json

import pytest
import torch

from dit.alignment import AlignmentConfig
from dit.checkpoint import TrainingState, load_tensors, save_tensors
from dit.diffusion import DiffusionConfig
from dit.ema import gamma_of
from dit.latents import LatentDataset
from dit.model import DiT, ModelConfig
from dit.objective import ObjectiveConfig
from dit.runtime import RunConfig
from dit.trainer import TrainConfig, fit, mathematics, on_device, step_inputs

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


@pytest.fixture(scope="module")
def featured(latents, tmp_path_factory):
    """The same latents with mirror images, and a 2x2 grid of features of each."""
    folder = tmp_path_factory.mktemp("featured")
    tensors = load_tensors(latents / "a.safetensors")
    features = torch.randn(40, 4, 6, generator=torch.Generator().manual_seed(0))
    tensors |= {"mean_mirror": tensors["mean"].flip(-1), "std_mirror": tensors["std"].flip(-1)}
    tensors |= {"features": features.half(), "features_mirror": (features + 100).half()}
    save_tensors(folder / "a.safetensors", tensors)
    (folder / "index.json").write_text((latents / "index.json").read_text())
    return folder


ALIGNED = ObjectiveConfig("transport", alignment=AlignmentConfig(weight=0.5, stop_step=5, projector_size=8))


def embedding_network():
    torch.manual_seed(0)
    config = ModelConfig("custom", 2, 16, 2, 2, condition="embeddings", block="cross_attention")
    return DiT(config, input_size=4, in_channels=2, num_classes=3, condition_shape=(4, 6))


def test_a_grid_without_its_mirror_is_refused_where_tokens_are_aligned_with_it(featured, tmp_path):
    tensors = load_tensors(featured / "a.safetensors")
    del tensors["features_mirror"]
    save_tensors(tmp_path / "a.safetensors", tensors)
    (tmp_path / "index.json").write_text((featured / "index.json").read_text())
    with pytest.raises(ValueError, match="encode.features: the file has no features_mirror for mirror images"):
        train(tmp_path, settings(), ALIGNED)


@pytest.mark.parametrize("stop", [2, 4, 5, 7])
def test_alignment_embeddings_and_power_averages_resume_bit_for_bit(featured, stop):
    config = settings(power_ema=(0.05, 0.1), weight_decay=0.1, grad_clip=1.0)

    def run(**options):
        data = LatentDataset(featured, config.seed, config.global_batch_size)
        return fit(embedding_network(), data, ALIGNED, config, RUN, **options)

    whole, asked = run(), []
    half = run(should_stop=lambda: len(asked) + 1 == stop or asked.append(1))
    assert half.step == stop
    torch.manual_seed(12345)
    assert_same(run(resume=half), whole)
    assert {"align.0.weight", "exp_avg.align.0.weight", "power.0.1.final_layer.linear.weight"} <= whole.tensors.keys()


def test_alignment_teaches_the_projector_until_it_stops(featured):
    def run(objective, steps):
        data = LatentDataset(featured, 0, 8)
        return fit(new_network(), data, objective, settings(max_steps=steps), RUN).tensors

    five, ten, plain = run(ALIGNED, 5), run(ALIGNED, 10), run(TRANSPORT, 5)
    assert torch.equal(five["align.4.weight"], ten["align.4.weight"])
    assert not torch.equal(run(ALIGNED, 4)["align.4.weight"], five["align.4.weight"])
    name = "model.blocks.0.attn.qkv.weight"
    assert not torch.equal(five[name], plain[name]) and not torch.equal(five[name], ten[name])
    assert not any(key.startswith("align") for key in plain)


def test_features_as_a_condition_and_as_a_target_are_those_of_the_picture_that_was_picked(featured):
    data = LatentDataset(featured, 0, 400)
    config = settings(class_dropout_prob=0.25)
    inputs = step_inputs(data.batch(0), data, embedding_network(), ALIGNED, config, 0)
    dropped = (inputs["y"] == 0).all(dim=(1, 2))
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.08)
    assert torch.equal(inputs["y"][~dropped], inputs["features"][~dropped])
    mirrored = inputs["features"].mean(dim=(1, 2)) > 50
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.1)
    plain = step_inputs(data.batch(0), data, new_network(), TRANSPORT, config, 0)
    assert "features" not in plain and plain.keys() == {"x", "y", "t", "noise"}
    assert all(torch.equal(plain[key], inputs[key]) for key in ("x", "t", "noise"))  # the same random numbers
    assert torch.equal(plain["y"] == 3, dropped)
    assert "features" not in step_inputs(data.batch(5), data, embedding_network(), ALIGNED, config, 5)


def test_features_travel_only_while_they_are_used(featured):
    data = LatentDataset(featured, 0, 4)
    carried = lambda network, step: "features" in on_device(data.batch(step), network, ALIGNED, step)  # noqa: E731
    assert [carried(new_network(), step) for step in (0, 4, 5)] == [True, True, False]  # aligned for five steps
    assert carried(embedding_network(), 5)


def test_an_unconditional_network_sees_no_label(latents):
    data = LatentDataset(latents, 0, 40)
    config = ModelConfig("custom", 2, 16, 1, 2, condition="none")
    network = DiT(config, input_size=4, in_channels=2, num_classes=3)
    assert not step_inputs(data.batch(0), data, network, TRANSPORT, settings(), 0)["y"].any()


def test_alignment_without_features_is_refused_before_the_first_step(latents):
    with pytest.raises(ValueError, match="objective.alignment.weight: the latents carry no features"):
        train(latents, settings(), ALIGNED)


def test_power_averages_are_those_of_the_weights_on_the_way(latents):
    weights = []
    run = RunConfig(log_every_steps=3, checkpoint_every_steps=1)
    keep = lambda state: weights.append(state.tensors["model.final_layer.linear.bias"].double())  # noqa: E731
    state = train(latents, settings(power_ema=(0.1,)), run=run, save=keep)
    edges = (torch.arange(11, dtype=torch.float64) / 10) ** (gamma_of(0.1) + 1)
    torch.testing.assert_close(
        state.tensors["power.0.1.final_layer.linear.bias"].double(),
        edges.diff() @ torch.stack(weights),
        rtol=1e-5,
        atol=1e-8,
    )
    assert_same(TrainingState(10, {k: v for k, v in state.tensors.items() if "power" not in k}, state.values),
                train(latents, settings()))  # fmt: skip


def test_no_steps_leave_the_weights_as_they_are(latents):
    state = train(latents, settings(max_steps=0, init_from="somewhere"))
    assert state.step == 0 and state.values == {"rows": []}
    for name, weight in new_network().named_parameters():
        assert torch.equal(state.tensors[f"model.{name}"], weight) and torch.equal(state.tensors[f"ema.{name}"], weight)


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
    names |= {
        mathematics(new_network(), ALIGNED, settings(), "x"),
        mathematics(new_network(), TRANSPORT, settings(power_ema=(0.1,)), "x"),
        mathematics(new_network(), TRANSPORT, settings(init_from="a"), "x", "digest of a"),
    }
    assert len(names) == 9
    moved = mathematics(new_network(), TRANSPORT, settings(init_from="b"), "x", "digest of a")
    unused = ObjectiveConfig("transport", diffusion=DiffusionConfig(schedule="cosine"))
    assert moved in names and mathematics(new_network(), unused, settings(), "x") in names


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
        ({"max_steps": -1, "init_from": "a"}, "max_steps must be 0 or more, got -1"),
        ({"init_from": " "}, "init_from must be null, a checkpoint folder"),
        ({"ema_decay": 1.5}, "ema_decay must be between"),
        ({"power_ema": (0.3,)}, "power_ema must be above 0 and below 0.2887"),
        ({"power_ema": (0.1, 0.1)}, "power_ema must not name a width twice"),
        ({"power_ema": (0.1,), "max_steps": 0, "init_from": "a"}, "power_ema needs at least one step"),
    ],
)
def test_bad_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


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

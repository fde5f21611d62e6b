import json

import pytest
import torch

from dit.alignment import AlignmentConfig
from dit.checkpoint import load_tensors, save_tensors
from dit.dataset import LatentDataset
from dit.ema import gamma_of
from dit.model import DiT, ModelConfig
from dit.monitor import COLUMNS
from dit.objective import ObjectiveConfig
from dit.parallel import World
from dit.runtime import RunConfig
from dit.saving import Saver
from dit.states import TrainingState
from dit.trainer import fit, share, step_inputs, used
from dit.training import TrainConfig

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


@pytest.fixture
def keep(tmp_path):
    """keep(state) saves a state as the stage does, and gives what is on the disk then."""
    saver = Saver(tmp_path / "states", keep=99)

    def keep(state: TrainingState):
        saver.save(state)
        saver.wait()
        return saver.last

    return keep


class StopAt:
    """Asked after each step: yes after so many."""

    def __init__(self, step):
        self.step, self.asked = step, 0

    def __call__(self):
        self.asked += 1
        return self.asked == self.step


def copied(state: TrainingState) -> TrainingState:
    """The state as it is now: the next step changes its tensors."""
    return TrainingState(state.step, {name: tensor.clone() for name, tensor in state.tensors.items()}, state.values)


def assert_same(a: TrainingState, b: TrainingState):
    assert a.step == b.step and a.values == b.values and a.tensors.keys() == b.tensors.keys()
    for name in a.tensors:
        assert torch.equal(a.tensors[name], b.tensors[name]), name


@pytest.mark.parametrize("objective", [TRANSPORT, DIFFUSION])
@pytest.mark.parametrize("stop", [1, 3, 4, 9])
def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(latents, objective, stop, keep):
    whole = train(latents, settings(), objective)
    half = train(latents, settings(), objective, should_stop=StopAt(stop))
    assert half.step == stop
    torch.manual_seed(12345)  # whatever happened between the two processes
    torch.rand(7)
    assert_same(train(latents, settings(), objective, resume=keep(half)), whole)


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
def test_alignment_embeddings_and_power_averages_resume_bit_for_bit(featured, stop, keep):
    config = settings(power_ema=(0.05, 0.1), weight_decay=0.1, grad_clip=1.0)

    def run(**options):
        data = LatentDataset(featured, config.seed, config.global_batch_size)
        return fit(embedding_network(), data, ALIGNED, config, RUN, **options)

    whole, half = run(), run(should_stop=StopAt(stop))
    assert half.step == stop
    torch.manual_seed(12345)
    assert_same(run(resume=keep(half)), whole)
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
    config = settings(class_dropout_prob=0.25, global_batch_size=400)
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
    assert set(used(data, new_network(), TRANSPORT, 0)) == {"mean", "std", "mean_mirror", "std_mirror", "label"}
    carried = lambda network, step: "features" in used(data, network, ALIGNED, step)  # noqa: E731
    assert [carried(new_network(), step) for step in (0, 4, 5)] == [True, True, False]  # aligned for five steps
    assert carried(embedding_network(), 5)


def test_an_unconditional_network_sees_no_label(latents):
    data = LatentDataset(latents, 0, 40)
    config = ModelConfig("custom", 2, 16, 1, 2, condition="none")
    network = DiT(config, input_size=4, in_channels=2, num_classes=3)
    assert not step_inputs(data.batch(0), data, network, TRANSPORT, settings(global_batch_size=40), 0)["y"].any()


def test_alignment_without_features_is_refused_before_the_first_step(latents):
    with pytest.raises(ValueError, match="objective.alignment.weight: the latents carry no features"):
        train(latents, settings(), ALIGNED)


def test_power_averages_are_those_of_the_weights_on_the_way(latents):
    weights = []
    run = RunConfig(log_every_steps=3, checkpoint_every_steps=1)
    note = lambda state: weights.append(state.tensors["model.final_layer.linear.bias"].double().clone())  # noqa: E731
    state = train(latents, settings(power_ema=(0.1,)), run=run, save=note)
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
    assert state.step == 0 and state.values["rows"] == []
    for name, weight in new_network().named_parameters():
        assert torch.equal(state.tensors[f"model.{name}"], weight) and torch.equal(state.tensors[f"ema.{name}"], weight)


def test_every_saved_state_can_be_resumed_from(latents, keep):
    saved = []
    whole = train(latents, settings(), save=lambda state: saved.append(keep(state)))
    assert [state.step for state in saved] == [4, 8, 10]
    for state in saved:
        assert_same(train(latents, settings(), resume=state), whole)


@pytest.mark.parametrize("first", [6, 5])  # rows are of three steps: the end of five cuts one short
def test_raising_max_steps_continues_a_constant_rate(latents, keep, first):
    half, whole = train(latents, settings(max_steps=first)), train(latents, settings(max_steps=12))
    assert_same(train(latents, settings(max_steps=12), resume=keep(half)), whole)


@pytest.mark.parametrize("objective", [TRANSPORT, DIFFUSION])
def test_device_batches_change_only_the_rounding(latents, objective):
    whole = train(latents, settings(), objective)
    for size in (1, 3, 4):
        run = RunConfig(log_every_steps=3, device_batch_size=size)
        parts = train(latents, settings(), objective, run=run)
        for a, b in zip(whole.values["rows"], parts.values["rows"], strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_it_learns(latents):
    state = train(latents, settings(max_steps=300, lr=3e-3), run=RunConfig(log_every_steps=50))
    losses = [row[1] for row in state.values["rows"]]
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


def test_the_average_is_scored_at_its_own_pace(latents):
    seen = []
    run = RunConfig(preview_every_steps=5, score_every_steps=3)
    train(
        latents,
        settings(),
        run=run,
        observe=lambda step, average: seen.append(("looked", step)),
        score=lambda step, average: seen.append(("scored", step)),
    )
    assert seen == [(what, at) for at in range(1, 11) for what, every in (("looked", 5), ("scored", 3))
                    if at % every == 0 or at == 10]  # fmt: skip


def test_the_log_tells_the_row_and_the_speed(latents):
    logged = {}
    state = train(
        latents, settings(), log=logged.__setitem__, speed=lambda step, waited: {"speed": step, "waited": waited}
    )
    assert list(logged) == [3, 6, 9, 10] == [row[0] for row in state.values["rows"]]
    for row in state.values["rows"]:
        told = dict(zip(COLUMNS, row, strict=True))
        assert logged[row[0]]["loss"] == told["loss"] and logged[row[0]]["speed"] == row[0]
        assert told["skipped"] == 0 and told["grad_norm"] > 0 and 0 < logged[row[0]]["waited"] < 60


@pytest.fixture
def poisoned(latents, tmp_path):
    """poisoned(images) is the latents' folder with infinite numbers in these."""

    def write(images):
        folder = tmp_path / f"poisoned-{len(images)}"
        folder.mkdir()
        tensors = load_tensors(latents / "a.safetensors")
        tensors["mean"][images] = torch.inf
        save_tensors(folder / "a.safetensors", tensors)
        (folder / "index.json").write_text((latents / "index.json").read_text())
        return folder

    return write


@pytest.mark.parametrize("change", [{}, {"grad_clip": 1.0, "power_ema": (0.1,)}])
def test_a_step_that_is_not_finite_changes_no_weight_and_the_next_ones_go_on(latents, poisoned, keep, change):
    folder, config, saved = poisoned([7]), settings(**change), []
    run = RunConfig(log_every_steps=5, checkpoint_every_steps=1)
    whole = train(folder, config, run=run, save=lambda state: saved.append(copied(state)))
    bad = [step for step in range(10) if 7 in LatentDataset(folder, 0, 8).indices(step)]
    assert len(bad) == 2 and [row[COLUMNS.index("skipped")] for row in whole.values["rows"]] == [1, 1]
    assert whole.tensors["adam.count"] == 8 and all(row[1] < 100 for row in whole.values["rows"])
    unchanged = [
        after.step - 1
        for before, after in zip(saved, saved[1:], strict=False)
        if all(
            torch.equal(before.tensors[n], after.tensors[n]) for n in after.tensors if n.startswith(("model", "exp_"))
        )
    ]
    assert unchanged == [step for step in bad if step > 0]
    assert all(tensor.isfinite().all() for state in saved for tensor in state.tensors.values())
    for state in (saved[bad[0]], saved[bad[1] - 1]):  # just after one such step, just before the other
        assert_same(train(folder, config, run=run, resume=keep(state)), whole)
    assert bad[0] > 0  # up to there it is the training that it would be without
    assert_same(saved[bad[0] - 1], train(latents, config, run=run, should_stop=StopAt(bad[0])))


def test_too_many_in_a_row_stop_the_training_and_name_the_last_good_state(poisoned):
    saved = []
    run = RunConfig(log_every_steps=4, checkpoint_every_steps=100, max_bad_steps=3)
    with pytest.raises(ValueError, match=r"not finite at steps 1 to 3 .*the last good state is step-7: ") as caught:
        train(poisoned(range(40)), settings(), run=run, save=saved.append, last_good=lambda: "step-7")
    assert "\n" not in str(caught.value) and not saved


def test_a_training_that_diverges_is_stopped(latents):
    saved = []
    wild = settings(lr=9.9, betas=(0.0, 0.0), max_steps=400, warmup_steps=0)
    with pytest.raises(ValueError, match=r"train.lr: loss or gradient is not finite at steps \d+ to \d+ "):
        train(latents, wild, save=lambda state: saved.append(copied(state)))
    assert saved and all(tensor.isfinite().all() for state in saved for tensor in state.tensors.values())


def test_bf16_follows_fp32(latents):
    fp32 = train(latents, settings(max_steps=30)).values["rows"]
    bf16 = train(latents, settings(max_steps=30, precision="bf16")).values["rows"]
    assert [row[1] for row in bf16] == pytest.approx([row[1] for row in fp32], rel=0.03)


def test_the_inputs_of_a_step(latents):
    data = LatentDataset(latents, 0, 4000)
    config = settings(class_dropout_prob=0.25, global_batch_size=4000)
    inputs = step_inputs(data.batch(0), data, new_network(), TRANSPORT, config, 0)
    dropped = (inputs["y"] == 3).float().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.03)
    kept = inputs["y"] != 3
    assert torch.equal(inputs["y"][kept], data.batch(0)["label"][kept])
    assert (
        0 <= inputs["t"].min() and inputs["t"].max() <= 1 and inputs["t"].mean().item() == pytest.approx(0.5, abs=0.03)
    )
    steps = step_inputs(data.batch(0), data, new_network(), DIFFUSION, config, 0)["t"]
    assert steps.dtype == torch.long and steps.min() >= 0 and steps.max() == 999
    again = step_inputs(data.batch(0), data, new_network(), TRANSPORT, config, 0)
    assert all(torch.equal(inputs[k], again[k]) for k in inputs)


def test_parts_of_a_step_are_those_of_the_whole(featured):
    data, network = LatentDataset(featured, 0, 12), embedding_network()
    config = settings(global_batch_size=12)
    whole = step_inputs(data.batch(3), data, network, ALIGNED, config, 3)
    parts = [share(12, World(rank, 3)) for rank in range(3)]
    made = [step_inputs(data.batch(3, part), data, network, ALIGNED, config, 3, part) for part in parts]
    assert whole.keys() == made[0].keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in made])), name


def test_a_batch_that_cannot_be_shared_out_is_refused():
    assert share(12, World(0, 1)) == slice(0, 12)
    with pytest.raises(ValueError, match="train.global_batch_size: 8 images are no whole number for each of 3 proc"):
        share(8, World(0, 3))


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

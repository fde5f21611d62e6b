import json

import pytest
import torch

from dit.checkpoint import (
    TrainingState,
    latest_state,
    load_checkpoint,
    network_config,
    save_checkpoint,
    save_state,
)
from dit.model import DiT, ModelConfig


def network():
    torch.manual_seed(0)
    made = DiT(ModelConfig("custom", 2, 16, 1, 2), input_size=4, in_channels=3, num_classes=5)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made.eval()


def test_a_checkpoint_explains_itself(tmp_path):
    ours = network()
    save_checkpoint(tmp_path, ours.state_dict(), {"model": network_config(ours), "classes": list("abcde")})
    opened = load_checkpoint(tmp_path)
    x, t, y = torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([1, 5])
    assert torch.equal(opened.model(x, t, y), ours(x, t, y))
    assert opened.config["classes"] == list("abcde") and not opened.model.training


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint: config.json is missing or torn"):
        load_checkpoint(tmp_path)
    ours = network()
    save_checkpoint(tmp_path, ours.state_dict(), {"model": network_config(ours)})
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors is missing or torn") as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "config.json").write_text(json.dumps({"format": "other/9"}))
    with pytest.raises(ValueError, match="is of format 'other/9'"):
        load_checkpoint(tmp_path)


def state(step):
    return TrainingState(step, {"a": torch.full((3,), float(step))}, {"rows": [[step, 0.1, 1e-4]]})


def test_the_last_states_are_kept_and_the_newest_is_found(tmp_path):
    for step in (5, 10, 15):
        save_state(tmp_path, state(step), keep=2)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "step-00000010.json",
        "step-00000010.safetensors",
        "step-00000015.json",
        "step-00000015.safetensors",
    ]
    found = latest_state(tmp_path)
    assert found.step == 15 and torch.equal(found.tensors["a"], torch.full((3,), 15.0))
    assert found.values == {"rows": [[15, 0.1, 1e-4]]}


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "sidecar"])
def test_a_torn_state_is_named_and_passed_over(tmp_path, capsys, harm):
    save_state(tmp_path, state(5), keep=2)
    save_state(tmp_path, state(10), keep=2)
    tensors = tmp_path / "step-00000010.safetensors"
    content = tensors.read_bytes()
    if harm == "truncate":
        tensors.write_bytes(content[:-3])
    elif harm == "flip":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "remove":
        tensors.unlink()
    else:
        (tmp_path / "step-00000010.json").write_text("{")
    assert latest_state(tmp_path).step == 5
    assert "step-00000010.safetensors is torn" in capsys.readouterr().out


def test_a_state_without_its_sidecar_does_not_count(tmp_path):
    save_state(tmp_path, state(5), keep=2)
    (tmp_path / "step-00000009.safetensors").write_bytes(b"half")
    assert latest_state(tmp_path).step == 5
    assert latest_state(tmp_path / "nowhere") is None

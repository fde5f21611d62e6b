"""`dit info`, as a person types it."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from dit import estimate, info
from dit.cli import main
from dit.model import DiT, ModelConfig

ROOT = Path(__file__).parents[1]


def test_the_table_tells_the_twelve_networks_and_what_was_assumed(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:13]] == estimate.names()
    assert lines[10].split()[1:4] == ["675,129,632", "118.62", "256"]
    notes = "\n".join(lines[13:])
    assert "7,000,000 steps" in notes and "20%" in notes and "training in bf16" in notes and "sampling in fp32" in notes
    assert "assumption" in notes and estimate.PRICES_OF in notes
    assert all(len(line) <= 120 for line in lines)


def test_one_network_in_detail(capsys):
    assert main(["info", "SiT-XL/2", "--image-size", "512", "--device", "h200", "--price", "2.5"]) == 0
    out = capsys.readouterr().out
    for told in ("SiT-XL/2 at 512 pixels", "676,014,368", "524.54", "1,024", "768,000,000 images", "one H200"):
        assert told in out, told
    assert "2.50 an hour, as given" in out and "3,000,000 steps" in out


def test_json_holds_the_same_figures(capsys):
    arguments = ["info", "DiT-XL/2", "--json", "--block", "in_context", "--precision", "fp32", "--mfu", "0.05"]
    assert main([*arguments, "--batch-size", "8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["assumed"]["mfu"] == 0.05 and told["assumed"]["device"]["name"] == "H100"
    (row,) = told["models"]
    assert row["block"] == "in_context" and row["gflops"] == pytest.approx(119.37, rel=1e-3)
    assert row["training_memory_bytes"]["adam"] == 8 * row["trained_parameters"]
    assert row["price_usd"] == pytest.approx(3 * row["accelerator_hours"])
    assert main(["info", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 12


def test_drawing_is_in_fp32_whatever_training_is_in(capsys):
    rows = []
    for precision in ("bf16", "fp32"):
        assert main(["info", "DiT-S/2", "--json", "--precision", precision]) == 0
        rows += json.loads(capsys.readouterr().out)["models"]
    drawing, training = ([row[f"{what}_memory_bytes"] for row in rows] for what in ("sampling", "training"))
    assert drawing[0] == drawing[1] > 4 * rows[0]["parameters"] and training[0] != training[1]


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["DiT-XXL/2"], "'DiT-XXL/2' is no published network"),
        (["DiT-B/8", "--image-size", "272"], "--image-size must be a multiple of 64 for DiT-B/8, got 272"),
        (["SiT-S/2", "--image-size", "264"], "--image-size must be a multiple of 16 for SiT-S/2, got 264"),
        (["--image-size", "264"], "--image-size must be a multiple of 64 for all twelve, got 264"),
        (["--device", "K80"], "device 'K80' is not in the table"),
        (["--block", "adaln-zero"], "block must be one of adaln_zero, adaln, cross_attention, in_context"),
        (["--mfu", "0"], "--mfu must be above 0 and at most 1, got 0.0"),
        (["--mfu", "nan"], "--mfu must be above 0 and at most 1, got nan"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (["--price", "-1"], "--price must be a number of US dollars, 0 or more, got -1.0"),
        (["--price", "inf"], "--price must be a number of US dollars, 0 or more, got inf"),
        (["--price", "nan"], "--price must be a number of US dollars, 0 or more, got nan"),
        (["params", "--image-size", "64"], "--image-size and --block are said by params.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert main(["info", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"dit: {message}") and err.count("\n") == 1


@pytest.fixture
def project(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_network_of_params_yaml(project, capsys):
    assert main(["info", "params"]) == 0
    out = capsys.readouterr().out
    assert "1,288,256" in out and "latents 8 x 8 x 4" in out and "153,600 images" in out


def test_precision_batch_and_averages_are_those_of_params_yaml_unless_a_flag_says_other(project, capsys):
    text = (project / "params.yaml").read_text()
    text = text.replace("power_ema: []", "power_ema: [0.05, 0.1]").replace(
        "device_batch_size: 0", "device_batch_size: 16"
    )
    (project / "params.yaml").write_text(text)

    def told(*flags):
        assert main(["info", "params", "--json", *flags]) == 0
        page = json.loads(capsys.readouterr().out)
        return page["assumed"], page["models"][0]["training_memory_bytes"]

    assumed, memory = told()
    assert (assumed["precision"], assumed["batch_size"], assumed["mfu"]) == ("fp32", 16, 0.1)
    assert memory["ema"] == 3 * memory["gradients"] and memory["weights"] == memory["gradients"]
    assumed, halved = told("--precision", "bf16", "--batch-size", "8")
    assert (assumed["precision"], assumed["batch_size"], assumed["mfu"]) == ("bf16", 8, 0.2)
    assert halved["weights"] == 1.5 * memory["weights"] and halved["activations"] < memory["activations"]
    (project / "params.yaml").write_text(text.replace("device_batch_size: 16", "device_batch_size: 0"))
    assert told()[0]["batch_size"] == 64


def test_encoded_data_of_other_settings_are_passed_over(project, capsys):
    encoded = {"image_size": 32, "size": 8, "channels": 4, "classes": []}
    for change, pretrained, counts in (
        ({}, None, True),
        ({"image_size": 64, "size": 16}, None, False),
        ({"size": 4}, None, False),
        ({"channels": 16}, None, False),
        ({}, "someone/vae", False),
    ):
        (project / "artifacts" / "encode").mkdir(parents=True, exist_ok=True)
        (project / "artifacts" / "vae").mkdir(exist_ok=True)
        (project / "artifacts" / "encode" / "index.json").write_text(json.dumps(encoded | change))
        (project / "artifacts" / "vae" / "fit.json").write_text(json.dumps({"pretrained": pretrained}))
        assert main(["info", "params"]) == 0
        out = capsys.readouterr().out
        assert "latents 8 x 8 x 4" in out
        assert ("as encoded (artifacts/encode)" if counts else "by arithmetic, 4 pixels each") in out.splitlines()[0]


def test_embeddings_are_known_once_they_are_encoded():
    sections = {
        "data": SimpleNamespace(image_size=64, num_classes=3),
        "vae": SimpleNamespace(pretrained="someone/vae", latent_channels=4),
        "train": SimpleNamespace(max_steps=10, global_batch_size=4, precision="fp32", power_ema=()),
        "run": SimpleNamespace(device_batch_size=0),
        "encode": SimpleNamespace(features="f.npz"),
        "model": ModelConfig("DiT-S/4", condition="embeddings"),
    }
    with pytest.raises(ValueError, match="their shape is known once `dvc repro encode` has run"):
        info.of_params(sections, 8, None)
    index = {"image_size": 64, "channels": 16, "size": 4, "features": {"shape": [7, 32], "source": "f.npz"}}
    for other in ({"image_size": 32}, {"features": {"shape": [7, 32], "source": "pixels-4x4"}}):
        with pytest.raises(ValueError, match="their shape is known once `dvc repro encode` has run"):
            info.of_params(sections, None, index | other)
    told = info.of_params(sections, None, index)
    assert (told["in_channels"], told["input_size"], told["condition_shape"]) == (16, 4, (7, 32))
    network = DiT(
        told["config"], **{k: told[k] for k in ("input_size", "in_channels", "num_classes", "condition_shape")}
    )
    page = info.answer("params", mine=lambda: dict(told))
    assert f"{sum(t.numel() for t in network.state_dict().values()):,}" in page and "40 images" in page

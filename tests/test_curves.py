"""loss.csv of a training, of this version and of earlier ones: read and drawn."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from dit.curves import loss_svg, read_losses

ROOT = Path(__file__).parents[1]
HEAD = "step,loss,lr,grad_norm,skipped,loss_t1,loss_t2,loss_t3,loss_t4\n"
ROWS = "2,1.5,0.1,3.0,0,1.25,1.5,,2.0\n4,,0.1,,2,,,,\n6,0.5,0.1,1.0,0,0.4,0.5,0.6,0.7\n"


def test_a_cell_without_a_figure_is_missing_from_its_row(tmp_path):
    (tmp_path / "loss.csv").write_text(HEAD + ROWS)
    first, second, third = read_losses(tmp_path / "loss.csv")
    assert first == {"step": 2, "loss": 1.5, "lr": 0.1, "grad_norm": 3, "skipped": 0} | {
        "loss_t1": 1.25,
        "loss_t2": 1.5,
        "loss_t4": 2,
    }
    assert second == {"step": 4, "lr": 0.1, "skipped": 2} and len(third) == 9


def test_the_curve_is_the_same_bytes_each_time_and_has_a_line_for_each_quarter(tmp_path):
    (tmp_path / "new.csv").write_text(HEAD + ROWS)
    (tmp_path / "old.csv").write_text("step,loss,lr\n2,1.5,0.1\n4,1.0,0.1\n")
    drawn, plain = loss_svg(tmp_path / "new.csv"), loss_svg(tmp_path / "old.csv", "a title")
    assert drawn == loss_svg(tmp_path / "new.csv")
    assert "times 0 to 0.25 (noise)" in drawn and "times 0.75 to 1 (data)" in drawn
    assert "a title" in plain and "times" not in plain
    assert ElementTree.fromstring(drawn).tag == "{http://www.w3.org/2000/svg}svg"  # a picture that stands by itself


def test_one_for_a_document_is_made_by_a_command(tmp_path):
    (tmp_path / "loss.csv").write_text(HEAD + ROWS)
    command = [sys.executable, "-m", "dit.curves", tmp_path / "loss.csv", tmp_path / "curve.svg", "the title"]
    subprocess.run(command, cwd=ROOT, check=True)
    assert "the title" in (tmp_path / "curve.svg").read_text()

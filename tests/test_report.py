"""The page of a run: what it says of the training's loss."""

from dit.stages.report import loss_curve

HEAD = "step,loss,lr,grad_norm,skipped,loss_t1,loss_t2,loss_t3,loss_t4\n"


def test_the_loss_is_shown_by_times_and_skipped_steps_are_told(tmp_path):
    file = tmp_path / "loss.csv"
    file.write_text(HEAD + "2,1.5,0.1,3.0,1,1.25,1.5,,2.0\n4,1.0,0.1,2.0,2,1.0,1.0,1.0,1.0\n")
    shown = loss_curve(file)
    assert shown.startswith("<svg") and "quarters of time" in shown
    assert "3 steps had no finite loss or gradient and changed nothing" in shown


def test_a_training_of_an_earlier_version_and_one_of_no_steps_are_shown_too(tmp_path):
    file = tmp_path / "loss.csv"
    file.write_text("step,loss,lr\n2,1.5,0.1\n4,1.0,0.1\n")
    shown = loss_curve(file)
    assert shown.startswith("<svg") and "quarters" not in shown and "finite" not in shown
    file.write_text(HEAD)
    assert loss_curve(file) == "<p class=note>Nothing was trained here.</p>"

"""A run as those see it who write to it."""

import json

from dit.recording import Run, figures


def test_nobodys_run_takes_everything():
    with Run() as run:
        run.log(1, {"loss": 1.0})
        run.metrics({"a": {"b": 1}})
        run.image("x", None, step=1)
        run.artifact("x", "y")
        run.tags({"a": 1})
    assert run.id is None and run.tracking_uri is None


def test_the_file_that_train_writes_may_be_shown():
    run = Run(None, None, "http://me:secret@host:5000")
    assert json.dumps(run.tracking_uri) == '"http://host:5000"'


def test_figures_are_flat_and_their_names_are_ones_that_mlflow_takes():
    assert figures({"cfg1.5": {"fid": 1, "deep": {"er": 2.5}}, "odd$name": 3, "text": "none"}) == {
        "cfg1.5/fid": 1.0,
        "cfg1.5/deep/er": 2.5,
        "odd_name": 3.0,
    }

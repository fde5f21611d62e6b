"""The queue in front of MLflow: nobody waits, nothing is lost that can still be sent."""

import threading
import time

import pytest
from waiting import until

from dit import outbox
from dit.outbox import BATCH, Outbox, Point


def points(*steps):
    return [Point("loss", 1.0, 0, step) for step in steps]


@pytest.fixture
def fast(monkeypatch):
    monkeypatch.setattr(outbox, "FLUSH_SECONDS", 0.02)
    monkeypatch.setattr(outbox, "RETRY_SECONDS", 0.05)


def test_points_arrive_in_order_and_in_batches_that_the_server_takes():
    batches = []
    box = Outbox(batches.append, say=pytest.fail)
    for step in range(2 * BATCH + 500):
        box.add(points(step))
    ended = []
    assert box.close(lambda: ended.append(len(batches)), seconds=60)
    assert [point.step for batch in batches for point in batch] == list(range(2 * BATCH + 500))
    assert max(map(len, batches)) <= BATCH and ended == [len(batches)]


def test_a_service_that_comes_back_gets_what_it_missed_and_its_absence_is_said_once(fast):
    away, tried, sent, said = threading.Event(), [], [], []
    away.set()

    def send(batch):
        tried.append(1)
        if away.is_set():
            raise ConnectionError("nobody there")
        sent.extend(batch)

    box = Outbox(send, said.append)
    box.add(points(0, 1))
    until(lambda: len(tried) > 3)
    assert len(said) == 1 and not sent
    away.clear()
    until(lambda: sent)
    assert [point.step for point in sent] == [0, 1]
    box.add(points(2))
    assert box.close(lambda: None, seconds=60)
    assert [point.step for point in sent] == [0, 1, 2] and len(said) == 1


def test_a_service_that_hangs_holds_up_nobody():
    never = threading.Event()
    box = Outbox(lambda batch: never.wait(60), say=pytest.fail)
    started = time.monotonic()
    for step in range(5000):
        box.add(points(step))
    assert time.monotonic() - started < 20
    assert not box.close(lambda: None, seconds=0.2)
    assert time.monotonic() - started < 30  # and not a minute
    never.set()


def test_a_service_that_is_gone_is_tried_a_last_time():
    attempts, ended = [], []

    def send(batch):
        attempts.append(len(batch))
        raise ConnectionError

    said = []
    box = Outbox(send, said.append)
    box.add(points(0))
    assert not box.close(lambda: ended.append(1), seconds=60)
    assert attempts == [1] and len(said) == 1
    assert ended == [1]  # the last call is made whatever happened: it ends the run, and the watching of the machine


def test_a_job_that_never_works_holds_up_no_other(fast):
    done, said = [], []

    def broken():
        raise ValueError("no picture")

    box = Outbox(lambda batch: None, said.append)
    box.do(lambda: done.append("first"))
    box.do(broken)
    box.do(lambda: done.append("last"))
    until(lambda: done == ["first", "last"])
    assert [str(error) for error in said] == ["no picture"]
    box.close(lambda: None, seconds=60)


def test_after_a_job_that_fails_curves_go_on_as_before_and_the_last_call_is_made(monkeypatch):
    monkeypatch.setattr(outbox, "FLUSH_SECONDS", 0.02)  # the other pause stays a minute
    sent, done, said, ended = [], [], [], []

    def broken():
        raise ValueError("no picture")

    box = Outbox(sent.extend, said.append)
    box.do(broken)
    for step in range(5):
        box.add(points(step))
        box.do(lambda step=step: done.append(step))
        until(lambda step=step: [point.step for point in sent] == done == list(range(step + 1)), 30)
    assert not box.close(lambda: ended.append(1), seconds=60)  # not all of it went out
    assert ended == [1] and [str(error) for error in said] == ["no picture"]


def test_a_job_is_tried_so_many_times_and_then_dropped(fast):
    tries, said = [], []

    def broken():
        tries.append(1)
        raise ValueError("no picture")

    box = Outbox(lambda batch: None, said.append)
    box.do(broken)
    until(lambda: not box._jobs)
    assert len(tries) == outbox.TRIES and len(said) == 1
    assert not box.close(lambda: None, seconds=60) and len(tries) == outbox.TRIES


def test_jobs_that_all_fail_wait_together_and_none_is_lost_when_the_place_is_back(fast, monkeypatch):
    monkeypatch.setattr(outbox, "TRIES", 1000)
    away, back, tried, done, said = threading.Event(), threading.Event(), [], [], []
    away.set()

    def job(number):
        tried.append(number)
        if number == 0 and back.is_set():  # between two rounds
            away.clear()
        if away.is_set():
            raise ConnectionError("nobody there")
        done.append(number)

    box = Outbox(lambda batch: None, said.append)
    for number in range(10):
        box.do(lambda number=number: job(number))
    until(lambda: len(tried) > 5)
    assert set(tried) == {0, 1} and len(said) == 1  # two in a row mean that nothing would work: ask no more of it
    back.set()
    until(lambda: len(done) == 10)
    assert done == list(range(10)) and box.close(lambda: None, seconds=60)


def test_what_is_kept_for_an_absent_service_is_bounded(monkeypatch):
    monkeypatch.setattr(outbox, "MAX_POINTS", 10)
    box = Outbox(lambda batch: time.sleep(60), say=pytest.fail)
    for step in range(1000):
        box.add(points(step))
    assert len(box._points) == 10

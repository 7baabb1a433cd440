"""The one pass of ingest: who is asked while the data are read."""

from types import SimpleNamespace

import pipeline.teachers.ingest as module
from pipeline.params.sources import ViewParams
from pipeline.teachers.ingest import PATIENCE_S, Asker


def test_teachers_work_for_a_minute_at_most_before_the_data_are_judged(monkeypatch):
    clock = [0.0]
    questions = []

    def ask(block, digest, views):
        questions.append((block, digest, views))
        clock[0] += 25.0

    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    params = SimpleNamespace(teacher_mode="cached", views=ViewParams(count=3))
    inputs = SimpleNamespace(
        splits={"train": None, "val": None, "test": None},
        digests={"train": "a", "val": "b"},
        cache=SimpleNamespace(ask=ask),
    )
    asker = Asker(params, inputs)
    asker.ask("test", "not asked")
    for block in range(6):
        asker.ask("val" if block == 0 else "train", block)
    assert questions == [(0, "b", 1), (1, "a", 3), (2, "a", 3)]
    assert clock[0] - 25.0 < PATIENCE_S <= clock[0]


def test_live_teachers_are_asked_about_validation_alone():
    asked = []
    inputs = SimpleNamespace(
        splits={"train": None, "val": None},
        digests={"train": "a", "val": "b"},
        cache=SimpleNamespace(ask=lambda *question: asked.append(question)),
    )
    asker = Asker(SimpleNamespace(teacher_mode="live", views=ViewParams(count=3)), inputs)
    for name in ("train", "val"):
        asker.ask(name, name)
    assert asked == [("val", "b", 1)]

"""Progress: what a callable sees, what is said beforehand, and what is refused."""

import types

import jax
import jax.numpy as jnp
import pytest

from flatopt import curvature
from flatopt._core import progress, risk


@pytest.mark.heart
def test_a_callable_sees_every_part():
    seen = []
    with progress.bar(lambda *report: seen.append(report), 3, "passes") as bar:
        for _ in range(3):
            bar.update()
    assert seen == [(done, 3, "passes") for done in range(4)]


def test_a_total_that_was_too_small_grows():
    seen = []
    with progress.bar(lambda *report: seen.append(report[:2]), 1, "passes") as bar:
        bar.update()
        bar.update()
    assert seen == [(0, 1), (1, 1), (2, 2)]


@pytest.mark.heart
def test_long_work_is_announced_once_and_short_work_never(monkeypatch, capsys):
    for seconds, expected in ((10.0, "passes will take about 2 minutes"), (0.1, "")):
        clock = iter([0.0, seconds, 2 * seconds, 3 * seconds])
        monkeypatch.setattr(progress.time, "monotonic", lambda clock=clock: next(clock))
        monkeypatch.setattr(progress, "load_tqdm", lambda: None)
        with progress.bar(None, 14, "passes") as bar:
            for _ in range(4):
                bar.update()
        text = capsys.readouterr().err
        assert text.count("will take") == bool(expected)
        assert expected in text


def test_whoever_gives_a_callable_or_false_is_left_in_peace(capsys):
    for choice in (False, lambda *_: None):
        progress.announce(choice, 1e4, "passes")
    assert capsys.readouterr().err == ""
    progress.announce(True, 1e4, "passes")
    assert "passes will take about 2.8 hours" in capsys.readouterr().err


def test_what_is_no_progress_is_refused():
    with pytest.raises(TypeError, match="progress must be None, a bool or a function"):
        progress.check_progress("bar")


def _clock(durations):
    """A clock that is read before and after each part of the work."""
    now = 0.0
    for duration in durations:
        yield now
        now += duration
        yield now


@pytest.mark.heart
@pytest.mark.parametrize(
    ("durations", "expected"),
    [
        ([30.0, 12.0], "probe will take about 2 minutes more."),
        ([30.0, 0.1], ""),  # the first time compiles
        ([0.2, 0.1], ""),
    ],
)
def test_passes_are_announced_before_the_second_batch(
    durations, expected, monkeypatch, capsys
):
    said = []

    class Batches:
        def __len__(self):
            return 10

        def __iter__(self):
            for _ in range(10):
                said.append(capsys.readouterr().err)
                yield jnp.ones((4, 2))

    def loss_fn(params, batch):
        return jnp.mean((batch @ params) ** 2)

    clock = _clock([*durations, *[0.0] * 100])
    monotonic = lambda: next(clock)  # noqa: E731
    monkeypatch.setattr(risk, "time", types.SimpleNamespace(monotonic=monotonic))
    monkeypatch.setattr(progress, "load_tqdm", lambda: None)
    operator = curvature.hessian(loss_fn, jnp.ones(2), Batches())
    curvature.probe(operator, jax.random.key(0), 8, num_deflated=0)
    assert said[1].strip() == expected
    assert not "".join(said[2:])

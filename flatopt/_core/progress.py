"""Progress of long analyses: a bar, a callable of the user, or a word beforehand."""

import contextlib
import contextvars
import functools
import sys
import time
from typing import Any

import jax

_OUTER = contextvars.ContextVar("progress of the bar around this one", default=None)

LONG = 60.0  # seconds from which an analysis says beforehand how long it will take
SHORT = 3.0  # those of a report, and from which a bar is shown


@functools.cache
def load_tqdm() -> Any:
    """The module tqdm, or None: a progress bar is a comfort, not a need."""
    try:
        import tqdm
    except ImportError:
        return None
    return tqdm


def check_progress(progress):
    """Reject what is neither None, a bool nor a function."""
    if progress is None or isinstance(progress, bool) or callable(progress):
        if progress is True and load_tqdm() is None:
            raise ImportError(
                "progress=True needs tqdm, which is not installed; run pip install tqdm, "
                "or give a function progress(done, total, description)."
            )
        return
    raise TypeError(
        f"progress must be None, a bool or a function, got {progress!r}; write True for a "
        "bar, or give progress(done, total, description)."
    )


class Bar:
    """What :func:`bar` yields: ``update()`` after each part of the work.

    ``total`` may be corrected while the work goes on.
    """

    def __init__(self, progress, total, description, announced=False):
        self.progress, self.total, self.description = progress, total, description
        self.done = 0
        self.started, self.announced = None, announced
        self.shown = self._open()
        self._report()

    def _open(self):
        if self.progress is False or callable(self.progress) or load_tqdm() is None:
            return None
        delay = 0 if self.progress else SHORT
        return load_tqdm().tqdm(
            total=self.total, desc=self.description, delay=delay, leave=False
        )

    def _report(self):
        if callable(self.progress):
            self.progress(self.done, self.total, self.description)

    def update(self, count=1):
        """Count parts that are done."""
        self.done += count
        if self.total is not None:
            self.total = max(self.total, self.done)
        if self.shown is not None:
            self.shown.total = self.total
            self.shown.update(count)
        self._report()
        self._announce()

    def _announce(self):
        """Once: the first part compiles, the time of the later ones tells how long."""
        now = time.monotonic()
        if self.started is None:
            self.started, self.first = now, self.done
        elif not self.announced and self.total is not None:
            self.announced = True
            each = (now - self.started) / (self.done - self.first)
            announce(self.progress, each * (self.total - self.done), self.description)

    def may_take_long(self, seconds):
        """Whether parts of so many seconds may come to more than is left unsaid."""
        is_heard = self.progress is not False and not callable(self.progress)
        return is_heard and not self.announced and self._rest(seconds) >= LONG

    def announce(self, seconds):
        """Say, before they start, how long parts of so many seconds will take."""
        if self._rest(seconds) >= LONG:
            self.announced = True
            announce(self.progress, self._rest(seconds), self.description)

    def _rest(self, seconds):
        return seconds * (self.total - self.done) if self.total is not None else 0.0

    def close(self):
        """Take the bar off the screen."""
        if self.shown is not None:
            self.shown.close()


@contextlib.contextmanager
def bar(progress, total, description, announced=False):
    """A bar over ``total`` parts of work (None: unknown), for a ``with`` block.

    ``progress`` as users give it: None for a bar once the work takes more than three
    seconds, True for one at once, False for none, or ``progress(done, total,
    description)``. When two parts are done and the rest will take more than a minute, a
    line says so, unless that was ``announced`` before. A bar within a bar of a function,
    or of False, shows nothing.
    """
    check_progress(progress)
    outer = _OUTER.get()
    if progress is None and (outer is False or callable(outer)):
        progress = False
    shown = Bar(progress, total, description, announced)
    token = _OUTER.set(progress) if progress is not None else None
    try:
        yield shown
    finally:
        if token is not None:
            _OUTER.reset(token)
        shown.close()


def timed(measures, progress, description):
    """What functions return, by name, and the seconds that each took, on one bar.

    Their times differ too much for a bar to foretell: announce them before.
    """
    found, seconds = {}, {}
    with bar(progress, len(measures), description, announced=True) as shown:
        for name, measure in measures.items():
            start = time.monotonic()
            found[name] = jax.block_until_ready(measure())
            seconds[name] = time.monotonic() - start
            shown.update()
    return found, seconds


def announce(progress, seconds, description, least=LONG):
    """Say how long the work will take, where that is more than a minute or so many seconds."""
    if seconds < least or progress is False or callable(progress):
        return
    text = f"{description} will take about {_duration(seconds)} more."
    if load_tqdm() is None:
        print(text, file=sys.stderr)
    else:
        load_tqdm().tqdm.write(text, file=sys.stderr)


def _duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"

"""Progress on a terminal, in a log, and not at all. `tests/test_notebooks.py` has the notebook."""

import pytest

from cascadevlm import Cascade
from cascadevlm.base import progress
from cascadevlm.testing import FakeScorer, noise

IMAGES = [noise(seed) for seed in range(3)]
CASCADE = Cascade(FakeScorer(), labels=["ant", "bee"])


def test_nothing_is_shown_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    CASCADE.classify(IMAGES)
    assert capsys.readouterr() == ("", "")


def test_a_log_gets_a_line_at_most_every_few_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    CASCADE.classify(IMAGES, progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "LOG_SECONDS", 0)
    CASCADE.classify(IMAGES, progress=True)
    assert capsys.readouterr().err.splitlines()[-1] == "3 of 3 images, $0.00 spent."
    CASCADE.classify(iter(IMAGES), progress=True)
    assert capsys.readouterr().err.splitlines()[-1] == "3 images, $0.00 spent."


def test_a_terminal_shows_a_bar_that_disappears(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    with progress.progress_bar(3) as show:
        show(2, 0.5)
    shown = capsys.readouterr().err
    assert "2/3" in shown
    assert "$0.50" in shown
    assert shown.endswith("\x1b[2K")

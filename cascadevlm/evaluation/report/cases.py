"""The cases of a report: a sample of each run's images with their candidates, verdicts and labels, as data for the page."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from cascadevlm.base.arrays import NOBODY
from cascadevlm.base.errors import BackendError, ImageError
from cascadevlm.base.html import thumbnail
from cascadevlm.base.images import load_image, pixel_digest
from cascadevlm.base.remote import place_of
from cascadevlm.evaluation.metrics import Bools
from cascadevlm.evaluation.record import Record
from cascadevlm.policies import measures

MOST_CASES = 1000
"""Largest number of cases of one run."""

MOST_IN_ALL = 2000
"""Largest number of cases of all runs of a page together."""

UNASKED = 5
"""Number of the scorer's best labels that are shown if no judge saw candidates."""


def kinds_of(record: Record) -> dict[str, Bools]:
    """``(N,)`` booleans for each kind of case, as `cascadevlm.evaluation.metrics.evaluate` counts them.

    An image can belong to several kinds.
    """
    readable = record.readable
    scorer_right, right = record.scored == record.truths, record.predicted == record.truths
    outcomes = np.array([stage.outcomes for stage in record.stages], dtype=str).reshape(-1, len(record))
    return {
        "rescued": readable & right & ~scorer_right,
        "harmed": readable & ~right & scorer_right,
        "abstained": readable & (record.predicted == NOBODY),
        "wrong": readable & ~right,
        "escalated": (outcomes != "").any(axis=0),
    }


def sample(kinds: Mapping[str, Bools], most: int, *, seed: int = 0) -> NDArray[np.intp]:
    """Rows of at most ``most`` images in ascending order. If there are more images, the rows are drawn at random.

    The same number of images is drawn from each kind. A kind with fewer images is included as a whole, and the others share the
    remaining places. An image of several kinds counts for the rarest kind. Images of no kind are a separate group.
    """
    size = len(next(iter(kinds.values())))
    by_rarity = sorted(kinds.values(), key=lambda of_kind: int(of_kind.sum()))
    first = np.select(by_rarity, range(len(by_rarity)), len(by_rarity))
    groups = sorted((np.flatnonzero(first == kind) for kind in range(len(by_rarity) + 1)), key=len)
    rng = np.random.default_rng(seed)
    chosen, room = np.zeros(size, dtype=bool), most
    for left, group in zip(range(len(groups), 0, -1), groups, strict=True):
        drawn = rng.permutation(group)[: room // left]
        chosen[drawn] = True
        room -= len(drawn)
    return np.flatnonzero(chosen)


def cases(runs: Mapping[str, tuple[Record, Record]], *, seed: int = 0) -> dict[str, JsonValue]:
    """The cases of all runs as JSON-serialisable data. Labels and thumbnails are numbers from 0; -1 stands for a missing value.

    Args:
        runs: two records per run, by the name of the run: the record as it was made, and the record under its policy. Both have
            the same order of images.
        seed: seed of the random choice of cases.
    """
    numbers: dict[tuple[str, str], int] = {}
    told: list[JsonValue] = []
    for name, (record, final) in runs.items():
        kinds = kinds_of(final)
        rows = sample(kinds, min(MOST_CASES, MOST_IN_ALL // len(runs)), seed=seed).tolist()
        images = [(record.names[row], record.digests[row] if record.digests else "") for row in rows]
        thumbnails = [numbers.setdefault(image, len(numbers)) for image in images]
        shown: list[JsonValue] = [
            {**_case(record, final, row), "thumbnail": thumbnail, "kinds": [kind for kind, holds in kinds.items() if holds[row]]}
            for row, thumbnail in zip(rows, thumbnails, strict=True)
        ]
        totals: dict[str, JsonValue] = {kind: int(holds.sum()) for kind, holds in kinds.items()}
        told.append({"name": name, "labels": list(record.labels.names), "totals": {"all": len(record), **totals}, "cases": shown})
    kinds_shown: list[JsonValue] = ["all", *kinds]
    return {"runs": told, "thumbnails": [*_thumbnails(numbers)], "kinds": kinds_shown, "chosen": "chosen at random"}


def _case(record: Record, final: Record, row: int) -> dict[str, JsonValue]:
    probability = float(final.probabilities[row])
    verdicts: list[JsonValue] = [
        {
            "judge": stage.judge,
            "outcome": stage.outcomes[row],
            "label": int(stage.answers[row]),
            "said": stage.rationales[row],
            "counts": ruled.outcomes[row] != "",
        }
        for stage, ruled in zip(record.stages, final.stages, strict=True)
        if stage.outcomes[row]
    ]
    scores = record.scores.rows(slice(row, row + 1))
    candidates: list[JsonValue] = [
        [column, round(float(scores.probabilities[0, column]), 4)] for column in _candidates(record, row)
    ]
    return {
        "name": Path(record.names[row]).name,
        "id": record.about[row].get("id") or "" if record.about else "",
        "readable": bool(record.readable[row]),
        "truth": int(record.truths[row]),
        "label": int(final.predicted[row]),
        "by": final.decided_by[row],
        "probability": None if np.isnan(probability) else round(probability, 4),
        "entropy": round(float(measures.entropy(scores)[0]), 4),
        "candidates": candidates,
        "verdicts": verdicts,
    }


def _candidates(record: Record, row: int) -> list[int]:
    """The columns of the last question's candidates, or of the scorer's best labels; empty if the image is unreadable."""
    shown = [stage.candidates[row] for stage in record.stages if stage.asked[row]]
    if shown:
        return [int(column) for column in shown[-1] if column != NOBODY]
    best = np.argsort(-record.scores.log_probs[row], kind="stable")[:UNASKED]
    return [int(column) for column in best] if record.readable[row] else []


def _thumbnails(images: Iterable[tuple[str, str]]) -> Iterable[str]:
    with ThreadPoolExecutor() as pool:
        yield from pool.map(_thumbnail, images)


def _thumbnail(image: tuple[str, str]) -> str:
    """A thumbnail as a data URI; "" if the file cannot be read, or now contains another image.

    Args:
        image: name of the file, and digest of its pixels. A digest of "" is not checked.
    """
    name, digest = image
    try:
        loaded = load_image(place_of(name))
    except (BackendError, ImageError):
        return ""
    if digest and pixel_digest(loaded) != digest:
        return ""
    return thumbnail(loaded)

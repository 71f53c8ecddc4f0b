"""Runs with a certificate: "at least 95 % of the labels are the judge's, with 95 % confidence", at the fewest questions.

1. All images are scored (`score_first`).
2. The rule `certify` says which images to ask about. Their answers teach an opinion, and test it.
3. The judge is asked about the images that the test does not let the run keep.
4. The predictions are written: the judge's label of each image that was asked about, and the taught label of each other image.

In every question, the candidates come from the scorer as it is configured, and never from what the answers taught: an answer to
other candidates would be another answer. All answers are in ``asked.jsonl``. So a run that was killed goes through the same steps
again, asks nothing twice, and writes the same predictions.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue
from scipy.special import expit

from cascadevlm.base import loop
from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import DataError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.threads import one_blas_thread
from cascadevlm.base.types import Candidate, Prediction, Verdict
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.cascade.engine import Run
from cascadevlm.config.agreement import AgreementConfig
from cascadevlm.decision.agreement import Promise
from cascadevlm.decision.certifying import Certificate, certify, planned
from cascadevlm.decision.opinions import Images
from cascadevlm.judges.cache import key_of
from cascadevlm.policies.rules import Always
from cascadevlm.runs.answers_file import ASKED, AnswersFile
from cascadevlm.runs.certificate import Facts, Missing, Phase, Standing
from cascadevlm.runs.inputs import Labelled, Named, some
from cascadevlm.runs.lines import checked
from cascadevlm.runs.run_folder import RunFolder, digest_key
from cascadevlm.runs.scored_first import AT_ONCE, Numbers, ScoredImages, score_first

WORTH_SAYING = 0.01
"""A certificate is of little use if this share of the images is right only by both opinions together."""


def run_certified(
    cascade: Cascade,
    agreement: AgreementConfig,
    inputs: Iterable[Named] | Labelled,
    folder: RunFolder,
    *,
    retry_failed: bool,
    stopping: Callable[[], bool],
    scored: Callable[[int], None],
    asked: Callable[[int, float], None],
    outlook: Callable[[str], None],
) -> bool:
    """Write the predictions of a run with a certificate into its folder. Returns False if the run was stopped before.

    Args:
        cascade: the cascade, with the store and the ledger of the folder.
        agreement: what is certified.
        inputs: the images. Their number must be known.
        folder: the folder.
        retry_failed: true to read unreadable images again, and to ask again from the first failed question on.
        stopping: function that is called before each batch. If it returns true, the run ends.
        scored: function that is called with the number of scored images.
        asked: function that is called with the number of images that the judge was asked about, and the US dollars spent.
        outlook: function that is called with a sentence about the work that is left.

    Raises:
        DataError: if the number of images is not known, or if the images are not those that were scored before.
    """
    if isinstance(inputs, Labelled):
        raise DataError("A certificate is for images without true labels.", hint="Remove [agreement].")
    if not isinstance(inputs, Sized):
        raise DataError("A certificate needs all images of a run before the first question.", hint="Give a folder or a list.")
    if folder.finished and folder.tally.images == len(inputs):
        return True
    images = score_first(
        cascade,
        inputs,
        folder.folder,
        began=folder.manifest.began,
        retry_failed=retry_failed,
        stopping=stopping,
        progress=scored,
    )
    if images is None:
        return False
    folder.fingerprinted(images.fingerprint)
    with closing(AnswersFile(folder, cascade.labels, len(inputs), retry_failed=retry_failed)) as answers:
        asking = Asking(cascade, images, inputs, answers, stopping=stopping, asked=asked)
        if sentence := asking.little_use():
            outlook(sentence)
        certificate = asking.certificate(agreement.promise, agreement.seed, outlook) if len(asking.readable) else None
        answers.sync()
        if certificate is None and not answers.skipped and len(asking.readable):
            return False
        folder.begin_again()
        asking.write(folder, certificate)
        if certificate is not None:
            folder.tally.certificate = _facts(certificate, folder, images)
        elif answers.skipped:
            folder.tally.certificate = asking.missing(agreement.promise)
    return True


def _facts(certificate: Certificate, folder: RunFolder, images: ScoredImages) -> Facts:
    manifest, tally = folder.manifest, folder.tally
    return Facts.of(
        certificate,
        unanswered=tally.asked - tally.answered,
        scorer=images.fingerprint,
        labels=images.labels.texts_digest,
        judge=manifest.stages[0],
        identity=key_of(manifest.judges[0]),
        prompt=manifest.contents["stage.0.prompt"],
    )


class Asking:
    """The questions of a certified run.

    Args:
        cascade: the cascade; its only stage asks.
        images: the scores of all M images.
        inputs: the images.
        answers: the answers so far.
        stopping: function that is called before each batch. If it returns true, no further batch is started.
        asked: function that is called with the number of images that the judge was asked about, and the US dollars spent.

    Attributes:
        readable: `(N,)` numbers of the images that could be read. Everything that is certified is about these.
        scored: what the scorer says of them.
        tested: the certificate after its test; None before.
    """

    def __init__(
        self,
        cascade: Cascade,
        images: ScoredImages,
        inputs: Iterable[Named],
        answers: AnswersFile,
        *,
        stopping: Callable[[], bool] = lambda: False,
        asked: Callable[[int, float], None] = lambda images, dollars: None,
    ) -> None:
        (stage,) = cascade.stages
        self.stage = replace(stage, policy=Always())
        self.cascade = cascade.altered(stages=[self.stage], calibration=None, learns_from=None, observers=[answers])
        self.images, self.inputs, self.answers = images, inputs, answers
        self.stopping, self.asked = stopping, asked
        self.readable: Numbers = np.flatnonzero(~np.isnan(images.log_probs[:, 0]))
        self.scored = Images(
            log_probs=images.log_probs,
            embeddings=images.embeddings,
            candidates=self._candidates(),
            rows=self.readable,
        )
        self.tested: Certificate | None = None

    def _candidates(self) -> Columns:
        """`(M, k)` columns of the candidates of all images."""
        rule = self.stage.candidates
        columns = np.full((len(self.images.log_probs), min(rule.most(), len(self.images.labels))), NOBODY, dtype=np.int64)
        for some_numbers in np.array_split(self.readable, len(self.readable) // AT_ONCE + 1):
            found = rule.columns(self.images.some(some_numbers))
            columns[some_numbers, : found.shape[1]] = found
        return columns

    def little_use(self) -> str:
        """A sentence if the calibration expects that both opinions together are right more often than the judge; "" if not."""
        asking = self.stage.asking
        if asking is None or not len(self.readable):
            return ""
        scores = self.images.some(self.readable[:: -(-len(self.readable) // AT_ONCE)])
        better = float((replace(asking, word_final=False).gain(scores) - asking.gain(scores)).mean())
        if better < WORTH_SAYING:
            return ""
        return (
            "A certificate of agreement is of little use here: by the calibration, scorer and judge together are right on "
            f'{better:.1%} more of the images than the judge alone. Without [agreement], fusion = "bayes" uses both.'
        )

    def answers_to(self, rows: NDArray[np.intp]) -> Columns | None:
        """`(n,)` answers of the judge to questions about n readable images; None if some images were not asked about.

        Args:
            rows: `(n,)` positions of the images among the readable images.
        """
        numbers = self.readable[rows]
        new = np.sort(numbers[~self.answers.has(numbers)])
        if len(new):
            loop.run(self._ask(new))
        return self.answers.answers[numbers] if self.answers.has(numbers).all() else None

    async def _ask(self, numbers: Numbers) -> None:
        wanted = {*numbers.tolist()}

        def sources() -> Iterator[ImageSource]:
            yield from (source for _, source in some(self.inputs, wanted))

        self.answers.numbers = numbers
        given = self.images.given_to(self.cascade, numbers)
        run: Run = given.begin(stopping=lambda: self.stopping() or self.answers.skipped > 0)
        async with aclosing(run.predictions(sources(), len(numbers))) as predictions:
            async for _ in predictions:
                self.asked(self.answers.asked, self.answers.folder.ledger.spent_dollars)

    def certificate(self, promise: Promise, seed: int, outlook: Callable[[str], None]) -> Certificate | None:
        """The certificate, after all its questions; None if the run was stopped or the budget was used up."""
        with one_blas_thread:
            rule = certify(self.scored, promise, seed=seed)
            rows = next(rule)
            while self.tested is None:
                if (answers := self.answers_to(rows)) is None:
                    return None
                try:
                    rows = rule.send(answers)
                except StopIteration as ended:
                    self.tested = cast(Certificate, ended.value)
        rest = self.tested.rest
        if left := int((~self.answers.has(self.readable[rest])).sum()):
            outlook(f"The labels of {len(self.tested.kept):,} images can be kept. The judge is asked about {left:,} more images.")
        return None if self.answers_to(rest) is None else self.tested

    def missing(self, promise: Promise) -> Missing:
        """What is missing for the certificate after the budget was used up."""
        asked = self.answers.asked
        if self.tested is not None:
            questions = self.tested.questions
        else:
            rows = np.flatnonzero(self.answers.has(self.readable))
            (plan,) = planned(self.scored, rows, self.answers.answers[self.readable[rows]], [promise])
            questions = math.ceil(plan.questions)
        missing = max(questions - asked, 1)
        dollars = missing * self.answers.dollars / asked if asked else None
        return Missing(agree=promise.agreement, asked=asked, questions=missing, dollars=dollars)

    def write(self, folder: RunFolder, certificate: Certificate | None) -> None:
        """Write all predictions.

        Args:
            folder: the folder of the run, without predictions.
            certificate: the certificate. None: an image that was not asked about gets the scorer's label.
        """
        total = len(self.images.log_probs)
        unasked = np.zeros(total, dtype=bool)
        unasked[self.readable if certificate is None else self.readable[certificate.kept]] = True
        if certificate is None:
            unasked[unasked] = ~self.answers.has(self.readable)
        standings = None if certificate is None else Standings(certificate, self.readable, self.images.labels.names)
        lines = self.images.lines(np.arange(total))
        for begin in range(0, total, AT_ONCE):
            numbers = np.arange(begin, min(begin + AT_ONCE, total))
            chosen = iter(self.stage.candidates.choose(self.images.some(numbers[unasked[numbers]])))
            for number, line in zip(numbers.tolist(), lines, strict=False):
                standing = None if standings is None or line.error else standings[number]
                also: dict[str, JsonValue] = {} if standing is None else {"certificate": standing.model_dump()}
                if line.error:
                    folder.append(line.path, Prediction(error=line.error))
                elif unasked[number]:
                    candidates = next(chosen)
                    prediction = self._skipped(candidates) if standing is None else _kept(candidates, standing)
                    folder.append(line.path, prediction, also | {digest_key(line.is_file): line.digest})
                else:
                    folder.append_again(line.path, self.answers.content(number) | also)

    def _skipped(self, candidates: tuple[Candidate, ...]) -> Prediction:
        best = candidates[0]
        verdict = Verdict(outcome="skipped", error="The budget was used up.", judge=self.stage.judge.spec)
        return Prediction(
            label=best.label.name,
            probability=best.probability,
            decided_by="scorer",
            candidates=candidates,
            reasons=("certificate: not asked yet",),
            verdicts=(verdict,),
        )


def _kept(candidates: tuple[Candidate, ...], standing: Standing) -> Prediction:
    return Prediction(
        label=standing.label,
        probability=float(expit(standing.log_odds)),
        decided_by="scorer",
        candidates=candidates,
        reasons=(f"certificate: kept, log-odds {standing.log_odds:.2f}",),
    )


class Standings:
    """What a certificate did with each of its images.

    Args:
        certificate: the certificate.
        readable: `(N,)` numbers of its images.
        names: names of the labels.
    """

    def __init__(self, certificate: Certificate, readable: Numbers, names: Sequence[str]) -> None:
        self.certificate, self.readable, self.names = certificate, readable, names
        phases: dict[Phase, NDArray[np.intp]] = {
            "taught": certificate.taught,
            "tested": certificate.order[certificate.drawn],
            "kept": certificate.kept,
            "asked": certificate.rest,
        }
        self._names = tuple(phases)
        self._phases = np.zeros(len(readable), dtype=np.int8)
        for number, rows in enumerate(phases.values()):
            self._phases[rows] = number

    def __getitem__(self, number: int) -> Standing:
        """The standing of the readable image with this number."""
        row = int(np.searchsorted(self.readable, number))
        return Standing(
            phase=self._names[self._phases[row]],
            label=self.names[int(self.certificate.labels[row])],
            log_odds=float(self.certificate.log_odds[row]),
        )


def questions_left(folder: Path, total: int) -> int:
    """Number of images that a certified run may still ask its judge about.

    Args:
        folder: folder of the run. It may not exist yet.
        total: number of images of the run.
    """
    path = folder / ASKED
    if not path.exists():
        return total
    with path.open("rb") as lines:
        return total - sum(checked(line) is not None for line in lines)

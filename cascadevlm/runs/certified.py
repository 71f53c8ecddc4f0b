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
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator, Sized
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from cascadevlm.base import loop
from cascadevlm.base.arrays import NOBODY, Columns
from cascadevlm.base.errors import DataError
from cascadevlm.base.images import ImageSource
from cascadevlm.base.threads import one_blas_thread
from cascadevlm.base.types import Candidate, Prediction, Verdict
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.agreement import AgreementConfig
from cascadevlm.config.finding import FindConfig
from cascadevlm.decision.agreement import Rows
from cascadevlm.decision.certifying import Certificate, certify, planned
from cascadevlm.decision.finding import find
from cascadevlm.decision.opinions import Images
from cascadevlm.policies.rules import Always
from cascadevlm.runs.answers_file import ASKED, AnswersFile
from cascadevlm.runs.batches.batch import answering
from cascadevlm.runs.certificate import Missing
from cascadevlm.runs.inputs import Labelled, Named, about, some
from cascadevlm.runs.lines import Line, checked
from cascadevlm.runs.outcomes import Certified, Outcome, Sought
from cascadevlm.runs.run_folder import RunFolder, digest_key
from cascadevlm.runs.scored_first import AT_ONCE, Numbers, ScoredImages, score_first

T = TypeVar("T")

Promised: TypeAlias = AgreementConfig | FindConfig
"""What a run promises."""

WORTH_SAYING = 0.01
"""A certificate is of little use if this share of the images is right only by both opinions together."""


def run_certified(
    cascade: Cascade,
    promised: Promised,
    inputs: Iterable[Named] | Labelled,
    folder: RunFolder,
    *,
    batches: Callable[[str], None] | None,
    retry_failed: bool,
    stopping: Callable[[], bool],
    scored: Callable[[int], None],
    asked: Callable[[int, float], None],
    outlook: Callable[[str], None],
) -> bool:
    """Write the predictions of a run with a certificate into its folder. Returns False if the run was stopped before.

    Args:
        cascade: the cascade, with the store and the ledger of the folder.
        promised: what is promised.
        inputs: the images. Their number must be known.
        folder: the folder.
        batches: function that is called with a sentence about each batch of the provider. None: the batch API is not used.
        retry_failed: true to read unreadable images again, and to ask again from the first failed question on.
        stopping: function that is called before each batch. If it returns true, the run ends.
        scored: function that is called with the number of scored images.
        asked: function that is called with the number of images that the judge was asked about, and the US dollars spent.
        outlook: function that is called with a sentence about the work that is left.

    Raises:
        DataError: if the number of images is not known, or if the images are not those that were scored before.
    """
    if isinstance(inputs, Labelled):
        raise DataError("A certificate is for images without true labels.", hint="Remove [agreement] or [find].")
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
    images.require_of(cascade.scorer)
    folder.fingerprinted(images.fingerprint)
    with closing(AnswersFile(folder, cascade.labels, len(inputs), retry_failed=retry_failed)) as answers:
        asking = Asking(cascade, images, inputs, answers, batches=batches, stopping=stopping, asked=asked)
        if len(asking.readable):
            outcome = asking.certified(promised, outlook) if isinstance(promised, AgreementConfig) else asking.found(promised)
        else:
            outcome = None
        answers.sync()
        if outcome is None and len(asking.readable) and (stopping() or not answers.skipped):
            return False
        folder.begin_again()
        asking.write(folder, outcome)
        if outcome is not None:
            folder.tally.certificate = outcome.statement(folder, images)
        elif answers.skipped:
            folder.tally.certificate = asking.missing(promised)
    return True


class Asking:
    """The questions of a certified run.

    Args:
        cascade: the cascade; its only stage asks.
        images: the scores of all M images.
        inputs: the images.
        answers: the answers so far.
        batches: function that is called with a sentence about each batch of the provider. None: the batch API is not used.
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
        batches: Callable[[str], None] | None = None,
        stopping: Callable[[], bool] = lambda: False,
        asked: Callable[[int, float], None] = lambda images, dollars: None,
    ) -> None:
        (stage,) = cascade.stages
        self.stage = replace(stage, policy=Always())
        self.cascade = cascade.altered(stages=[self.stage], calibration=None, learns_from=None, observers=[answers])
        self.images, self.inputs, self.answers = images, inputs, answers
        self.batches = batches
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

        def classifying(cascade: Cascade) -> AsyncGenerator[Prediction, None]:
            return cascade.begin(stopping=self._ending).predictions(sources(), len(numbers))

        self.answers.numbers = numbers
        given = self.images.given_to(self.cascade, numbers)
        folder = self.answers.folder
        async with answering(given, classifying, folder.folder, told=self.batches, stopping=self.stopping) as ready:
            if ready is None:
                return
            async with aclosing(classifying(ready)) as predictions:
                async for _ in predictions:
                    self.asked(self.answers.asked, folder.ledger.spent_dollars)

    def _ending(self) -> bool:
        """True if no further question is asked. In a batch, what is answered is paid for, and is read in any case."""
        return self.stopping() or (self.batches is None and self.answers.skipped > 0)

    def driven(self, rule: Generator[Rows, Columns, T]) -> T | None:
        """The result of a rule that yields numbers of images to ask about; None if some images were not asked about."""
        with one_blas_thread:
            rows = next(rule)
            while (answers := self.answers_to(rows)) is not None:
                try:
                    rows = rule.send(answers)
                except StopIteration as ended:
                    return cast(T, ended.value)
        return None

    def certified(self, agreement: AgreementConfig, outlook: Callable[[str], None]) -> Outcome | None:
        """The certificate, after all its questions; None if the run was stopped or the budget was used up."""
        if sentence := self.little_use():
            outlook(sentence)
        self.tested = self.driven(certify(self.scored, agreement.promise, seed=agreement.seed))
        if self.tested is None:
            return None
        rest = self.tested.rest
        if left := int((~self.answers.has(self.readable[rest])).sum()):
            outlook(f"The labels of {len(self.tested.kept):,} images can be kept. The judge is asked about {left:,} more images.")
        return None if self.answers_to(rest) is None else Certified(self.tested, self.images.labels.names)

    def found(self, config: FindConfig) -> Outcome | None:
        """The images of a class; None if the run was stopped or the budget was used up."""
        column = config.column(self.images.labels)
        result = self.driven(find(self.scored, column, config.wanted, seed=config.seed))
        return None if result is None else Sought(config, result, self.images.labels.names)

    def missing(self, promised: Promised) -> Missing:
        """What is missing after the budget was used up."""
        asked, questions = self.answers.asked, None
        if self.tested is not None:
            questions = self.tested.questions
        elif isinstance(promised, AgreementConfig):
            rows = np.flatnonzero(self.answers.has(self.readable))
            (plan,) = planned(self.scored, rows, self.answers.answers[self.readable[rows]], [promised.promise])
            questions = math.ceil(plan.questions)
        missing = None if questions is None else max(questions - asked, 1)
        dollars = missing * self.answers.dollars / asked if asked and missing else None
        return Missing(asked=asked, questions=missing, dollars=dollars)

    def write(self, folder: RunFolder, outcome: Outcome | None) -> None:
        """Write all predictions.

        Args:
            folder: the folder of the run, without predictions.
            outcome: what was decided. None: an image that was not asked about gets the scorer's label.
        """
        total = len(self.images.log_probs)
        unasked = np.zeros(total, dtype=bool)
        unasked[self.readable[~self.answers.has(self.readable)] if outcome is None else self.readable[outcome.unasked]] = True
        rows = np.cumsum(np.isin(np.arange(total), self.readable)) - 1
        lines, told = self.images.lines(np.arange(total)), about(self.inputs)
        for begin in range(0, total, AT_ONCE):
            numbers = np.arange(begin, min(begin + AT_ONCE, total))
            scores = self.images.some(numbers[unasked[numbers]])
            chosen = enumerate(self.stage.candidates.choose(scores))
            for number, line, of_image in zip(numbers.tolist(), lines, told, strict=False):
                row = int(rows[number])
                place_in = {} if outcome is None or line.error else {"certificate": outcome.standing(row).model_dump()}
                also = {**of_image} | place_in
                if line.error:
                    folder.append(line.path, also, Prediction(error=line.error))
                elif unasked[number]:
                    place, shown = next(chosen)
                    own = scores.rows(slice(place, place + 1))
                    prediction = self._skipped(shown) if outcome is None else outcome.prediction(row, shown, own)
                    folder.append(line.path, also | {digest_key(line.is_file): line.digest}, prediction)
                else:
                    content = self.answers.content(number) | also
                    if outcome is not None and outcome.is_rejected(content):
                        own = self.images.some(np.array([number]))
                        other = outcome.prediction(row, (), own)
                        content |= {"label": other.label, "probability": other.probability}
                    folder.append_again(line.path, content)

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


def questions_left(folder: Path, total: int, *, retry_failed: bool) -> int:
    """Largest number of images that a certified run may still ask its judge about.

    Args:
        folder: folder of the run. It may not exist yet.
        total: number of images of the run.
        retry_failed: true to count failed questions, too. The answers that come after them may then be others.
    """
    path = folder / ASKED
    if not path.exists():
        return total
    with path.open("rb") as lines:
        bodies = (body for body in map(checked, lines) if body is not None)
        return total - sum(not (retry_failed and Line.read(body).failed) for body in bodies)

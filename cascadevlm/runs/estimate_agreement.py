"""Estimates what a certificate costs, from the scores of all images and the answers to the first questions of the run."""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from cascadevlm.base.errors import ConfigError, ImageError, RunError
from cascadevlm.cascade.cascade import Cascade
from cascadevlm.config.agreement import AgreementConfig
from cascadevlm.decision.certifying import first_rows, opening, planned
from cascadevlm.runs.answers_file import AnswersFile
from cascadevlm.runs.certified import Asking
from cascadevlm.runs.inputs import Inputs
from cascadevlm.runs.manifest import Manifest
from cascadevlm.runs.run_folder import RunFolder
from cascadevlm.runs.scored_first import score_first


@dataclass(frozen=True, kw_only=True)
class AgreementEstimate:
    """What a certificate of a share is expected to cost.

    Attributes:
        agree: the share of labels that are the judge's.
        images: number of images that can be read.
        asked: number of questions that the estimate is made from. The run asks them, too, and their answers are in the cache.
        questions: expected number of questions of the whole run, all parts included.
        questions_range: interval that contains the number of questions with about 95 % probability.
        dollars: usual cost of these questions in US dollars, at the mean price of the answers so far.
        dollars_range: cost of ``questions_range``.
        tested: false if so few images can be kept that no test is needed.
    """

    agree: float
    images: int
    asked: int
    questions: int
    questions_range: tuple[int, int]
    dollars: float
    dollars_range: tuple[float, float]
    tested: bool


def estimate_agreement(
    cascade: Cascade,
    inputs: Inputs,
    agreements: Sequence[AgreementConfig],
    *,
    scored: Callable[[int], None] = lambda images: None,
    asked: Callable[[int, float], None] = lambda images, dollars: None,
) -> list[AgreementEstimate]:
    """The estimate for each of several certificates. Scores all images, and asks the judge the first questions of the run.

    The answers are kept in the store of the cascade, so a run does not ask these questions again.

    Args:
        cascade: a cascade that can give a certificate.
        inputs: all images of the run.
        agreements: the certificates, with one seed.
        scored: function that is called with the number of scored images.
        asked: function that is called with the number of images that the judge was asked about, and the US dollars spent.

    Raises:
        ConfigError: if the cascade has no store, or if the budget is too small for the first questions.
        ImageError: if no image can be read.
        RunError: if the judge gives no label to any of the first questions.
    """
    if cascade.store is None:
        raise ConfigError(
            "An estimate of a certificate asks questions, but without a cache their answers would be lost.",
            hint="Use cache.enabled = true.",
        )
    with TemporaryDirectory() as scratch:
        manifest = Manifest.of(cascade, inputs, {})
        with RunFolder.opened(Path(scratch), manifest, inputs, dollars=cascade.ledger.cap_dollars) as folder:
            images = score_first(cascade, inputs, folder.folder, began=folder.manifest.began, progress=scored)
            assert images is not None
            with closing(AnswersFile(folder, cascade.labels, len(inputs), retry_failed=False)) as answers:
                paying = cascade.altered(ledger=folder.ledger)
                asking = Asking(paying, images, inputs, answers, asked=asked)
                total = len(asking.readable)
                if not total:
                    raise ImageError("No image can be read.", hint="Check the paths and the formats of the images.")
                rows = first_rows(asking.readable, opening(total), agreements[0].seed)
                found = asking.answers_to(rows)
                if found is None:
                    raise ConfigError(
                        f"The budget is too small for the first {len(rows)} questions of the run.", hint="Raise budget.usd."
                    )
                if (found < 0).all():
                    hint = "To see the reason, classify one of the images: cascadevlm classify IMAGE."
                    raise RunError(f"None of the first {len(rows)} questions got a label from the judge.", hint=hint)
                price = answers.dollars / answers.asked
                plans = planned(asking.scored, rows, found, [agreement.promise for agreement in agreements])
    return [
        AgreementEstimate(
            agree=plan.promise.agreement,
            images=total,
            asked=len(rows),
            questions=round(plan.questions),
            questions_range=(round(plan.low), round(plan.high)),
            dollars=price * plan.questions,
            dollars_range=(price * plan.low, price * plan.high),
            tested=plan.kept,
        )
        for plan in plans
    ]

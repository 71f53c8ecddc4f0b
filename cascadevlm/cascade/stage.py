"""A stage of a cascade: one judge, the images that it is asked about, and the form of the questions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from cascadevlm.base.bounds import Count, Natural, require_number
from cascadevlm.base.errors import InputError, PolicyError, PromptError
from cascadevlm.base.labels import LabelSet
from cascadevlm.base.portable import Portable
from cascadevlm.base.types import Candidate, Prompt, Question, Scores
from cascadevlm.cascade.candidates import CandidateRule, TopK
from cascadevlm.cascade.fusing import Asking
from cascadevlm.decision.auditing import Sampling
from cascadevlm.decision.calibration import FusionRule
from cascadevlm.decision.judge_model import JudgeModel
from cascadevlm.judges.base import Judge
from cascadevlm.judges.support import SupportSet
from cascadevlm.judges.voting import Voting
from cascadevlm.policies.base import PolicyLike, as_budgeted, as_policy, uncalibrated
from cascadevlm.policies.rules import Always, GainAbove

_MADE_BY: Mapping[str, tuple[type, str]] = {
    "judge": (Judge, 'load_judge("openai:gpt-4o")'),
    "prompt": (Prompt, 'load_prompt("select")'),
    "candidates": (CandidateRule, "TopK(k=5)"),
}


@dataclass(frozen=True, kw_only=True)
class Stage(Portable):
    """One judge of a cascade, the images that it is asked about, and the form of the questions.

    The policy of the first stage sees the scorer's scores. The policy of a later stage sees only the images that the judge
    before it was asked about or, with routing, the images that were left to this stage. It sees these scores:

    - with fusion: the probabilities after the judge's answer;
    - without fusion: the judge's own probabilities, or a probability of 1 for an answer without probabilities;
    - without an answer: the scorer's scores.

    After the answer "none of these", the next candidates are chosen among the other labels.

    Attributes:
        judge: the judge.
        prompt: the prompt of the questions.
        policy: the policy, which selects the images to escalate. Default: all images.
        candidates: the rule for the candidates. Default: the 5 most probable labels.
        offer_none: true if "none of these" is one of the options.
        support: reference images. The prompt must contain ``$references``.
        fusion: how the final label is chosen: "judge" takes the judge's answer; "bayes" takes the most probable label by scorer
            and judge together.
        model: a model of the judge. It is required for fusion "bayes" and for policies that use the expected gain.
        votes: number of questions about each image, with the candidates in another order each time (`Voting`).
        widen: number of further questions, about the next candidates, after the answer "none of these".
        audit: the images that the judge is also asked about if the policy does not escalate them. Default: none.

    Raises:
        InputError: if an argument has a wrong type, for example a spec in place of an object; if ``votes`` is not a number of
            at least 1, or ``widen`` is not a number of at least 0; if ``fusion`` is "bayes" and there is no model; if ``widen``
            is above 0 and "none of these" is not offered.
        PromptError: if the prompt contains ``$references`` and ``support`` is missing, or the other way round.
        PolicyError: if the policy uses the expected gain and there is no model.
    """

    judge: Judge
    prompt: Prompt
    policy: PolicyLike = Always()
    candidates: CandidateRule = TopK()
    offer_none: bool = False
    support: SupportSet | None = None
    fusion: FusionRule = "judge"
    model: JudgeModel | None = None
    votes: int = 1
    widen: int = 0
    audit: Sampling | None = None

    def __post_init__(self) -> None:
        for name, (kind, fix) in _MADE_BY.items():
            require_kind(name, getattr(self, name), kind, fix)
        require_number("votes", self.votes, Count)
        require_number("widen", self.widen, Natural)
        if self.support is not None:
            require_kind("support", self.support, SupportSet, "SupportSet.read(Path(folder), labels)")
        if self.fusion != "judge" and self.model is None:
            raise InputError(f"fusion = {self.fusion!r} needs a calibration.", hint="Make one: cascadevlm calibrate.")
        if self.support is None and self.prompt.shows_references:
            raise PromptError(
                f"Prompt {self.prompt.name!r} shows $references.",
                hint="Give the stage a support folder, or use a prompt without $references.",
            )
        if self.support is not None and not self.prompt.shows_references:
            raise PromptError(
                f"Prompt {self.prompt.name!r} has no place for the support images.",
                hint="Use a prompt with $references, for example select_fewshot, or remove the support folder.",
            )
        if self.widen and not self.offer_none:
            raise InputError(f"widen = {self.widen} needs the answer 'none of these'.", hint="Offer it: offer_none = true.")
        if self.model is None and as_policy(self.policy).by_gain:
            raise uncalibrated(as_policy(self.policy))

    def question(self, image: Image.Image, candidates: tuple[Candidate, ...], label_set: LabelSet | None = None) -> Question:
        """The question about an image. The candidates are labels of the label set, in the order in which the judge sees them."""
        return Question(
            image=image,
            candidates=candidates,
            prompt=self.prompt,
            exemplars=self.support.of(candidates) if self.support else (),
            offer_none=self.offer_none,
            label_set=label_set,
        )

    def by_votes(self, judge: Judge) -> Judge:
        """The judge. If the stage has several votes, the judge is asked once per vote."""
        return Voting(judge, self.votes) if self.votes > 1 else judge

    def gain(self, scores: Scores) -> tuple[float, ...] | None:
        """(N,) `Spending.gain`; None if the stage has no model of its judge or if the policy does not use the gain."""
        policy = as_budgeted(self.policy)
        if self.asking is None or not (policy.by_gain or policy.limits):
            return None
        return tuple(self.asking.gain(scores).tolist())

    @property
    def asking(self) -> Asking | None:
        """The expected gain from a question and the effect of its answer; None if the stage has no model of its judge."""
        if self.model is None:
            return None
        return Asking(
            model=self.model,
            candidates=self.candidates,
            none_offered=self.offer_none,
            word_final=self.fusion == "judge",
        )


def require_kind(name: str, value: object, kind: type, fix: str) -> None:
    """Refuse an argument of a wrong type, for example a spec in place of an object.

    Args:
        name: name of the argument.
        value: value of the argument.
        kind: the class that the value must have.
        fix: an expression that makes an object of this class.

    Raises:
        InputError: if the value has another type. The hint contains ``fix``.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name} must be a {kind.__name__}, not {value!r}.", hint=f"For example: {fix}.")


def require_cascade(stages: Sequence[Stage], *, routing: bool) -> None:
    """Refuse stages that cannot form a cascade.

    Raises:
        InputError: if the stages differ in their fusion, or if there is routing with fewer than two stages.
        PolicyError: if there is routing and a policy cannot choose between judges.
    """
    if len(fusions := sorted({stage.fusion for stage in stages})) > 1:
        raise InputError(
            f"The stages have different fusions: {' and '.join(map(repr, fusions))}.", hint="Give all stages the same fusion."
        )
    if not routing:
        return
    if len(stages) < 2:
        raise InputError("Routing needs two judges to choose between.", hint="Add a [[stage]], or remove routing.")
    for stage in stages:
        if not isinstance(as_policy(stage.policy), GainAbove):
            raise PolicyError(
                f"The policy '{as_policy(stage.policy)}' cannot choose between judges.",
                hint='With routing, use only a gain policy, for example "gain > 0.02", and limit all cost by [budget] usd.',
            )

"""A stage of a cascade: one judge, and when and how it is asked."""

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
    """One judge of a cascade and when and how it is asked.

    The policy of the first stage sees the scorer's scores. That of a later stage sees the images its predecessor was asked
    about or, with routing, left to it, with the scores as they then stand: what both opinions say together, where they are
    fused; else the judge's own probabilities, certainty where it answered without any, and the scorer's where it gave no answer.
    After "none of these", candidates are chosen among the other labels.

    Attributes:
        fusion: whose word is final: the judge's, or the more probable label by both.
        model: of the judge; policies of gain and fusion want it.
        votes: how often the judge is asked about an image, the candidates in another order each time (`Voting`).
        widen: how many times more the judge is asked, about the next candidates, where it chose "none of these".

    Raises:
        InputError: if judge, prompt, candidates or support are something else, such as a spec; if ``votes`` is not a whole number
            from 1 on or ``widen`` not one from 0 on; if opinions are to be fused and there is no model; if the list is to widen
            after an answer that is not offered.
        PromptError: if the prompt shows reference images and there is no support set, or the other way round.
        PolicyError: if the policy goes by gain and there is no model.
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
            raise PromptError(f"Prompt {self.prompt.name!r} shows $references.", hint="Give the stage a support folder.")
        if self.support is not None and not self.prompt.shows_references:
            raise PromptError(
                f"Prompt {self.prompt.name!r} has no place for the support images.",
                hint="Take one with $references, as select_fewshot, or no support.",
            )
        if self.widen and not self.offer_none:
            raise InputError(f"widen = {self.widen} needs the answer 'none of these'.", hint="Offer it: offer_none = true.")
        if self.model is None and as_policy(self.policy).by_gain:
            raise uncalibrated(as_policy(self.policy))

    def question(self, image: Image.Image, candidates: tuple[Candidate, ...], label_set: LabelSet | None = None) -> Question:
        """What the judge is asked about an image, the candidates, of the label set, in the order they are to be shown."""
        return Question(
            image=image,
            candidates=candidates,
            prompt=self.prompt,
            exemplars=self.support.of(candidates) if self.support else (),
            offer_none=self.offer_none,
            label_set=label_set,
        )

    def by_votes(self, judge: Judge) -> Judge:
        """The stage's judge, or what is around it, asked as often about an image as there are votes."""
        return Voting(judge, self.votes) if self.votes > 1 else judge

    def gain(self, scores: Scores) -> tuple[float, ...] | None:
        """`Spending.gain` for N images; None if the judge is not known, or if the policy does not look at the gain."""
        policy = as_budgeted(self.policy)
        if self.asking is None or not (policy.by_gain or policy.limits):
            return None
        return tuple(self.asking.gain(scores).tolist())

    @property
    def asking(self) -> Asking | None:
        """What asking is worth, if the judge is known."""
        if self.model is None:
            return None
        return Asking(
            model=self.model,
            candidates=self.candidates,
            none_offered=self.offer_none,
            word_final=self.fusion == "judge",
        )


def require_kind(name: str, value: object, kind: type, fix: str) -> None:
    """Refuse an argument of another kind, such as a spec.

    Raises:
        InputError: saying how to make one.
    """
    if not isinstance(value, kind):
        raise InputError(f"{name} must be a {kind.__name__}, not {value!r}.", hint=f"For example: {fix}.")


def require_cascade(stages: Sequence[Stage], *, routing: bool) -> None:
    """Refuse stages that make no cascade together.

    Raises:
        InputError: if their fusion differs, or there is nothing to choose between in routing.
        PolicyError: if a policy cannot choose between judges and is to.
    """
    if len(fusions := sorted({stage.fusion for stage in stages})) > 1:
        raise InputError(f"The stages differ in their fusion, {' and '.join(map(repr, fusions))}.", hint="Give all the same.")
    if not routing:
        return
    if len(stages) < 2:
        raise InputError(
            "With routing, there must be two judges to choose between.", hint="Add a [[stage]], or leave routing out."
        )
    for stage in stages:
        if not isinstance(as_policy(stage.policy), GainAbove):
            raise PolicyError(
                f"The policy '{as_policy(stage.policy)}' cannot choose between judges.",
                hint='With routing, go by gain alone, as in "gain > 0.02"; what may be spent in all is [budget] usd.',
            )

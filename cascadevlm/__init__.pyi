from .candidates import CumulativeMass, TopK
from .cascade import Cascade
from .errors import CascadeError
from .judge import Judge, LocalJudge
from .labels import Label, LabelSet
from .policy import Policy
from .policy_language import parse_policy
from .registry import load_judge, load_prompt, load_scorer
from .scorer import EmbeddingScorer, Scorer
from .stage import Stage
from .types import Candidate, Prediction, Question, Scores, Usage, Verdict

__version__: str

__all__ = [
    "Candidate",
    "Cascade",
    "CascadeError",
    "CumulativeMass",
    "EmbeddingScorer",
    "Judge",
    "Label",
    "LabelSet",
    "LocalJudge",
    "Policy",
    "Prediction",
    "Question",
    "Scorer",
    "Scores",
    "Stage",
    "TopK",
    "Usage",
    "Verdict",
    "load_judge",
    "load_prompt",
    "load_scorer",
    "parse_policy",
]

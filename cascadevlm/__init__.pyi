from .base.errors import CascadeError
from .base.labels import Label, LabelSet
from .base.types import Candidate, Prediction, Question, Scores, Usage, Verdict
from .cascade.candidates import CumulativeMass, TopK
from .cascade.cascade import Cascade
from .cascade.stage import Stage
from .config.loading import load_judge, load_prompt, load_scorer
from .judges.base import Judge, LocalJudge
from .policies.base import Policy
from .policies.language import parse_policy
from .scorers.base import EmbeddingScorer, Scorer

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

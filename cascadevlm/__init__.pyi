from .base.errors import (
    BackendError,
    BudgetExhausted,
    CascadeError,
    ConfigError,
    DataError,
    FatalError,
    ImageError,
    InputError,
    JudgeError,
    LabelError,
    PermanentError,
    PolicyError,
    PromptError,
    RateLimited,
    RunError,
    TransientError,
)
from .base.labels import Label, LabelSet
from .base.types import Candidate, Prediction, Prompt, Question, Scores, Usage, Verdict
from .cascade.candidates import CumulativeMass, TopK
from .cascade.cascade import Cascade
from .cascade.observer import Observer
from .cascade.stage import Stage
from .config.loading import load_judge, load_prompt, load_scorer
from .decision.adapting import fit_adapter
from .evaluation.calibrating.calibrate import calibrate
from .evaluation.calibrating.recipe import Recipe
from .evaluation.calibrating.targets import Target
from .judges.base import Judge, LocalJudge, Quote
from .policies.base import Policy, Spending
from .policies.language import parse_policy
from .scorers.adapters import Adapter, read_adapter
from .scorers.base import EmbeddingScorer, Scorer
from .scorers.several import SeveralScorers

__version__: str

__all__ = [
    "Adapter",
    "BackendError",
    "BudgetExhausted",
    "Candidate",
    "Cascade",
    "CascadeError",
    "ConfigError",
    "CumulativeMass",
    "DataError",
    "EmbeddingScorer",
    "FatalError",
    "ImageError",
    "InputError",
    "Judge",
    "JudgeError",
    "Label",
    "LabelError",
    "LabelSet",
    "LocalJudge",
    "Observer",
    "PermanentError",
    "Policy",
    "PolicyError",
    "Prediction",
    "Prompt",
    "PromptError",
    "Question",
    "Quote",
    "RateLimited",
    "Recipe",
    "RunError",
    "Scorer",
    "Scores",
    "SeveralScorers",
    "Spending",
    "Stage",
    "Target",
    "TopK",
    "TransientError",
    "Usage",
    "Verdict",
    "calibrate",
    "fit_adapter",
    "load_judge",
    "load_prompt",
    "load_scorer",
    "parse_policy",
    "read_adapter",
]

from .api.cascade import Cascade
from .api.classifier import CascadeClassifier
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
from .base.frames import predictions_frame
from .base.labels import Label, LabelSet
from .base.tables import ColumnNames
from .base.types import Candidate, Prediction, Prompt, Question, Scores, Usage, Verdict
from .cascade.candidates import CumulativeMass, TopK
from .cascade.observer import Observer
from .cascade.stage import Stage
from .config.loading import load_judge, load_prompt, load_scorer
from .decision.adapting import fit_adapter
from .evaluation.calibrating.calibrate import Calibrated, calibrate
from .evaluation.calibrating.recipe import Recipe
from .evaluation.calibrating.targets import Target
from .evaluation.data import Data, read_data
from .evaluation.metrics import Evaluation, evaluate
from .evaluation.plots import accuracy_deferral, accuracy_dollars, confusion, entropy_histogram, reliability
from .evaluation.record import Record, read_record
from .evaluation.record_frame import record_frame
from .evaluation.sweep import Sweep, sweep, under
from .evaluation.write_record import write_record
from .judges.base import Judge, LocalJudge, Quote
from .policies.base import Policy, Spending
from .policies.language import parse_policy
from .runs.correction_files import import_corrections
from .runs.export import export
from .runs.tally import Tally
from .scorers.adapters import Adapter, read_adapter
from .scorers.base import EmbeddingScorer, Scorer
from .scorers.several import SeveralScorers

__version__: str

__all__ = [
    "Adapter",
    "BackendError",
    "BudgetExhausted",
    "Calibrated",
    "Candidate",
    "Cascade",
    "CascadeClassifier",
    "CascadeError",
    "ColumnNames",
    "ConfigError",
    "CumulativeMass",
    "Data",
    "DataError",
    "EmbeddingScorer",
    "Evaluation",
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
    "Record",
    "RunError",
    "Scorer",
    "Scores",
    "SeveralScorers",
    "Spending",
    "Stage",
    "Sweep",
    "Tally",
    "Target",
    "TopK",
    "TransientError",
    "Usage",
    "Verdict",
    "accuracy_deferral",
    "accuracy_dollars",
    "calibrate",
    "confusion",
    "entropy_histogram",
    "evaluate",
    "export",
    "fit_adapter",
    "import_corrections",
    "load_judge",
    "load_prompt",
    "load_scorer",
    "parse_policy",
    "predictions_frame",
    "read_adapter",
    "read_data",
    "read_record",
    "record_frame",
    "reliability",
    "sweep",
    "under",
    "write_record",
]

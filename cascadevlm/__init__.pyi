__all__: list[str]

from .candidates import CumulativeMass as CumulativeMass
from .candidates import TopK as TopK
from .cascade import Cascade as Cascade
from .errors import CascadeError as CascadeError
from .judge import Judge as Judge
from .judge import LocalJudge as LocalJudge
from .labels import Label as Label
from .labels import LabelSet as LabelSet
from .policy_language import parse_policy as parse_policy
from .registry import load_judge as load_judge
from .registry import load_prompt as load_prompt
from .registry import load_scorer as load_scorer
from .scorer import EmbeddingScorer as EmbeddingScorer
from .scorer import Scorer as Scorer
from .stage import Stage as Stage
from .types import (
    Candidate as Candidate,
)
from .types import (
    Prediction as Prediction,
)
from .types import (
    Question as Question,
)
from .types import (
    Scores as Scores,
)
from .types import (
    Usage as Usage,
)
from .types import (
    Verdict as Verdict,
)

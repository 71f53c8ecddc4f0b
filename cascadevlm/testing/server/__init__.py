"""A server on this machine that speaks OpenAI's and Anthropic's protocols, batches included, and fails as it is told.

The providers' own clients talk to it, so a test goes through everything but the model::

    async with JudgeServer(faults=[Fault("rate_limit", retry_after=1), None, Fault("truncated")]) as server:
        judge = load_judge("openai:gpt-4o", base_url=server.openai_url)

Needs aiohttp: ``pip install 'cascadevlm[testing]'``.
"""

from cascadevlm.base.errors import BackendError

try:
    import aiohttp  # noqa: F401
except ModuleNotFoundError as exc:
    raise BackendError("The judge server needs the package 'aiohttp'.", hint="pip install 'cascadevlm[testing]'") from exc

from cascadevlm.testing.server.app import JudgeServer
from cascadevlm.testing.server.batches import Batch, Row
from cascadevlm.testing.server.conversation import Conversation, Received
from cascadevlm.testing.server.faults import Fault, FaultKind

__all__ = ["Batch", "Conversation", "Fault", "FaultKind", "JudgeServer", "Received", "Row"]

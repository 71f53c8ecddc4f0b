"""A server on this machine that speaks OpenAI's and Anthropic's protocols, batches included, and fails as it is told.

The providers' own clients talk to it, so a test goes through everything but the model::

    async with JudgeServer(faults=[Fault("rate_limit", retry_after=1), None, Fault("truncated")]) as server:
        judge = load_judge("openai:gpt-4o", base_url=server.openai_url)
"""

from tests.server.app import JudgeServer
from tests.server.batches import Batch, Row
from tests.server.conversation import Conversation, Received
from tests.server.faults import Fault, FaultKind

__all__ = ["Batch", "Conversation", "Fault", "FaultKind", "JudgeServer", "Received", "Row"]

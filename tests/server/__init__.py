"""A server on this machine with OpenAI's and Anthropic's protocols, including batches. It can produce faults. Tests use the
providers' own clients, so everything except the model is real::

    async with JudgeServer(faults=[Fault("rate_limit", retry_after=1), None, Fault("truncated")]) as server:
        judge = load_judge("openai:gpt-4o", base_url=server.openai_url)
"""

from tests.server.app import JudgeServer
from tests.server.batches import Batch, Row
from tests.server.conversation import Conversation, Received
from tests.server.faults import Fault, FaultKind

__all__ = ["Batch", "Conversation", "Fault", "FaultKind", "JudgeServer", "Received", "Row"]

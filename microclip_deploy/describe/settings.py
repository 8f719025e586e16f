"""How classes are described, and what a call is known by."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from microclip_deploy.describe.budget import Price
from microclip_deploy.describe.endpoint import endpoint_name
from microclip_deploy.describe.questions import Call, Plan

DEFAULT_ENDPOINT = "https://api.openai.com/v1"

_REPLY_TOKENS = (200, 80)
"""Most that a reply may have, and most for each sentence in it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How classes are described."""

    model: str
    """Its name at the endpoint."""
    endpoint: str = DEFAULT_ENDPOINT
    """Base URL."""
    domain: str | None = None
    """What the classes are kinds of."""
    per_class: int = 20
    """Sentences about each class, those of comparisons not counted."""
    concurrency: int = 4
    """Calls that are under way together."""
    most_tokens: int | None = None
    """In and out, all runs for a file together; None for no limit."""
    most_cost: float | None = None
    """US dollars; None for no limit."""
    price: Price | None = None
    """None where it is not known."""
    seed: int = 0
    temperature: float = 0.1
    timeout_s: float = 600
    """Of a reply; a small machine writes ten sentences in minutes."""
    pairs: Sequence[tuple[int, int]] = ()
    """Rows of confused classes, which are compared."""

    def plan(self, names: Sequence[str]) -> Plan:
        """Return the calls for these classes."""
        return Plan(names, domain=self.domain, per_class=self.per_class, pairs=self.pairs)

    def most_reply_tokens(self, call: Call) -> int:
        """Return the most tokens that a reply may have."""
        fixed, each = _REPLY_TOKENS
        return fixed + each * call.sentences

    def parameters(self, call: Call) -> dict[str, int | float]:
        """Return what else decides a reply."""
        sampling = {"temperature": self.temperature, "seed": self.seed}
        return {**sampling, "max_tokens": self.most_reply_tokens(call)}

    def key(self, call: Call) -> str:
        """Return what a call is known by: equal for calls that ask the same of the same model."""
        asked = [endpoint_name(self.endpoint), self.model, self.parameters(call), call.messages]
        text = json.dumps(asked, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

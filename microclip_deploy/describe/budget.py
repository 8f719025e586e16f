"""Tokens and money: a request is sent only while its worst case still fits.

The worst case is the prompt's bytes (no byte-level tokenizer makes more tokens of them), what chat
templates add, and the most tokens that the reply may have. It stays reserved until the endpoint has
said what was used; where it never says, the worst case counts as used.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

from microclip_deploy.errors import ThresholdError


class Usage(NamedTuple):
    """Tokens."""

    tokens_in: int = 0
    tokens_out: int = 0

    def plus(self, other: "Usage") -> "Usage":
        """Return the sum."""
        return Usage(self.tokens_in + other.tokens_in, self.tokens_out + other.tokens_out)

    @property
    def total(self) -> int:
        """Both together."""
        return self.tokens_in + self.tokens_out

    def to_json(self) -> dict[str, int]:
        """Return plain values."""
        return {"in": self.tokens_in, "out": self.tokens_out}


class Price(NamedTuple):
    """US dollars for a million tokens."""

    tokens_in: float = 0
    tokens_out: float = 0

    def of(self, usage: Usage) -> float:
        """Return US dollars."""
        paid = usage.tokens_in * self.tokens_in + usage.tokens_out * self.tokens_out
        return paid / 1e6


class Charge:
    """What a request costs: the worst case until `used` is set."""

    def __init__(self, worst: Usage) -> None:
        self.used = worst


class Budget:
    """Limits on all requests for one file, those of earlier runs included."""

    def __init__(
        self,
        *,
        most_tokens: int | None = None,
        most_cost: float | None = None,
        price: Price | None = None,
        spent: Usage | None = None,
    ) -> None:
        """Take the limits.

        Args:
            most_tokens: in and out together; None for no limit.
            most_cost: US dollars at this price; None for no limit.
            price: needed for `most_cost`.
            spent: before this run.
        """
        self._most_tokens, self._most_cost = most_tokens, most_cost
        self._price = price or Price()
        self.spent = spent or Usage()
        self._reserved = Usage()
        self._changed = asyncio.Condition()

    @property
    def cost(self) -> float | None:
        """US dollars spent; None where no price is known."""
        return self._price.of(self.spent) if any(self._price) else None

    @asynccontextmanager
    async def request(self, worst: Usage) -> AsyncIterator[Charge]:
        """Reserve what a request may cost at most, while it is under way.

        Raises:
            ThresholdError: it does not fit, even when all that is under way has ended.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._fits(worst) or not self._reserved.total)
            if not self._fits(worst):
                raise self._reached(worst)
            self._reserved = self._reserved.plus(worst)
        charge = Charge(worst)
        try:
            yield charge
        finally:  # nothing is awaited before the sums are right again
            returned = Usage(-worst.tokens_in, -worst.tokens_out)
            self._reserved = self._reserved.plus(returned)
            self.spent = self.spent.plus(charge.used)
            async with self._changed:
                self._changed.notify_all()

    def _fits(self, worst: Usage) -> bool:
        all_of_it = self.spent.plus(self._reserved).plus(worst)
        return (self._most_tokens is None or all_of_it.total <= self._most_tokens) and (
            self._most_cost is None or self._price.of(all_of_it) <= self._most_cost
        )

    def _reached(self, worst: Usage) -> ThresholdError:
        limits = []
        if self._most_tokens is not None:
            limits.append(f"{self._most_tokens:,} tokens (used: {self.spent.total:,})")
        if self._most_cost is not None:
            limits.append(f"{self._most_cost:g} USD (used: {self._price.of(self.spent):.4f})")
        return ThresholdError(
            f"expected to stay within {' and '.join(limits)}; the next call takes up to "
            f"{worst.total:,} tokens and was not made"
        )

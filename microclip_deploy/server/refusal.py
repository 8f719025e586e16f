"""A request that gets an error for an answer."""

from collections.abc import Mapping


class Refusal(Exception):
    """An HTTP status with what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str,
        retry_after_s: int | None = None,
        headers: Mapping[str, str] = {},
    ) -> None:
        """Say what is wrong.

        Args:
            status: of HTTP, 400 to 599.
            message: what was expected, what was found, what to do; no paths, no names of files.
            kind: a word for the metrics.
            retry_after_s: when another attempt makes sense, seconds.
            headers: more that the answer carries.
        """
        super().__init__(message)
        self.status, self.kind, self.retry_after_s = status, kind, retry_after_s
        self.headers = headers


def late() -> Refusal:
    """Return the refusal of a request whose time is over."""
    return Refusal(504, "no answer within the time limit; send fewer at once", "late")

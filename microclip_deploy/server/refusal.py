"""A request that gets an error for an answer."""


class Refusal(Exception):
    """An HTTP status with what the client is told."""

    def __init__(
        self, status: int, message: str, kind: str, retry_after_s: int | None = None
    ) -> None:
        """Say what is wrong.

        Args:
            status: of HTTP, 400 to 599.
            message: what was expected, what was found, what to do; no paths, no names of files.
            kind: a word for the metrics.
            retry_after_s: when another attempt makes sense, seconds.
        """
        super().__init__(message)
        self.status, self.kind, self.retry_after_s = status, kind, retry_after_s

"""The two streams of the command line: results on stdout, everything else on stderr."""

import json
import sys
from typing import Any

from rich.console import Console

from microclip_deploy.standard_output import discard


class _Notes(Console):
    """stderr. Where nobody reads it any more, a long run goes on in silence."""

    def on_broken_pipe(self) -> None:
        """Stop printing instead of ending the process, as the base class does."""
        self.quiet = True
        discard(sys.stderr)


notes = _Notes(stderr=True, highlight=False, soft_wrap=True)
"""Everything that is no result."""
out = Console(highlight=False)
"""Results."""


def print_json(value: Any) -> None:
    """Print one line of JSON; the last line of stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")
    sys.stdout.flush()

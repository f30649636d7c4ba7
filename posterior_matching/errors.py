"""The one exception that reaches users as a single line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend. Its message is one line: what is wrong, and the remedy.

    Scripts print it and exit with status 1; no stack trace.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint such as ``did you mean 'steps'?``, or the list of known names when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"

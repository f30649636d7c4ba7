"""Exceptions that are shown to users as a single line."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix. Its message is one line: the problem and the remedy.

    Scripts print it and exit with status 1, without a stack trace.
    """


class OptionError(UserError):
    """A wrong option.

    The code that takes an option raises this with the option's own name; the code that read it from a group of options
    prefixes the name of the group (`within`). A model therefore need not know where in a config its options are.

    Args:
        option: Its name, such as `latent_dim`.
        problem: What is wrong with it: "must be at least 1, not 0". A "{}" stands for the name; without one, the
            message begins with the name.
    """

    def __init__(self, option: str, problem: str):
        text = problem.replace("{}", option, 1) if "{}" in problem else f"{option} {problem}"
        super().__init__(" ".join(text.split()))  # one line, whatever was typed
        self.option, self.problem = option, problem

    def within(self, group: str) -> "OptionError":
        """Returns the same error for the option as a member of `group`: `config.model.latent_dim`."""
        return OptionError(".".join(filter(None, (group, self.option))), self.problem)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint such as ``did you mean 'steps'?``, or the list of known names when none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known)}"

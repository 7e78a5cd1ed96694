"""Error texts for names that do not exist."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown_name(what: str, given: str, allowed: Iterable[str]) -> str:
    """Write the one line that names the nearest valid name, or all of them.

    Args:
        what: What kind of name it is, e.g. ``recipe key``.
        given: The name that does not exist.
        allowed: The names that do.
    """
    names = sorted(allowed)
    nearest = get_close_matches(given, names, n=1, cutoff=0.5)
    if nearest:
        return f"unknown {what} {given!r}; did you mean {nearest[0]!r}?"
    return f"unknown {what} {given!r}; allowed are {', '.join(names)}"

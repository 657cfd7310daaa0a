"""Checks of names and values, for options, configurations and requests. Standard library only."""

import difflib
import math
from collections.abc import Collection, Iterable
from typing import Any


class ConfigError(ValueError):
    """A parameter has an invalid value, or its name is unknown. The message names parameter, rule and value."""


def broken_rule(name: str, value: Any, rule: str) -> ConfigError:
    """Returns the error for a parameter `name` whose `value` is not `rule`, e.g. "an integer >= 1"."""
    return ConfigError(f"{name} must be {rule}, got {value!r}")


def describe_unknown(name: object, known: Iterable[str]) -> str:
    """Returns a hint for an unknown name: "did you mean 'top_k'?", or "known are a, b, c" if none is similar."""
    known = list(known)
    nearest = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {nearest[0]!r}?" if nearest else f"known are {', '.join(known)}"


def check_choice(name: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ConfigError unless `value` is one of `choices`."""
    if value not in list(choices):  # a list, because a value from a file may not be hashable
        raise broken_rule(name, value, f"one of {', '.join(map(str, choices))}")


def check_bool(name: str, value: Any) -> None:
    """Raises ConfigError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise broken_rule(name, value, "true or false")


def check_integer(name: str, value: Any, *, minimum: int, maximum: int | None = None) -> None:
    """Raises ConfigError unless `value` is an int, not a bool, in the range; both limits are inclusive."""
    if not is_integer(value, minimum=minimum) or (maximum is not None and value > maximum):
        limit = "" if maximum is None else f" and <= {maximum}"
        raise broken_rule(name, value, f"an integer >= {minimum}{limit}")


def is_integer(value: Any, *, minimum: int) -> bool:
    """Returns whether `value` is an int, not a bool, of at least `minimum`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def check_number(
    name: str, value: Any, *, minimum: float, maximum: float | None = None, exclude_minimum: bool = False
) -> None:
    """Raises ConfigError unless `value` is an int or float, not a bool, in the range.

    Args:
        name: of the parameter.
        value: to be checked.
        minimum: smallest valid value.
        maximum: largest valid value, which may be infinite; None accepts any finite number.
        exclude_minimum: whether `minimum` itself is invalid.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    above_minimum = is_number and (value > minimum if exclude_minimum else value >= minimum)
    below_maximum = is_number and (math.isfinite(value) if maximum is None else value <= maximum)
    if not above_minimum or not below_maximum:
        limit = "" if maximum in (None, math.inf) else f" and <= {maximum}"
        raise broken_rule(name, value, f"a number {'>' if exclude_minimum else '>='} {minimum}{limit}")

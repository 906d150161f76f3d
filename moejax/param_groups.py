"""Parameter groups: rules, one a line, that treat some parameters differently from the rest.

    'role=embedding lr=0.1'               a tenth of the learning rate
    'path=*/experts/* lr=2 decay=0'       twice the learning rate, no weight decay
    'path=* frozen', 'path=head trained'  all but the head is left as it is

A rule names parameters by `path` (`*` stands for anything, slashes included) or `role` (see
`moejax.params.ParamSpec`) or both, and sets `lr` (a factor of the learning rate), `decay` (0 or 1: whether
weight decay applies), `frozen` or `trained`. A later rule overrides an earlier one in what it sets. A stack of
layers is one parameter, so all its layers are treated alike.
"""

import difflib
import fnmatch
import math
from typing import NamedTuple

from moejax.axes import ROLES

WORDS = "path=, role=, lr=, decay=, frozen, trained"


class Treatment(NamedTuple):
    """How one parameter is trained.

    Attributes:
      lr: factor of the learning rate.
      decay: whether weight decay applies.
      frozen: no gradient, no optimiser state, no change.
    """

    lr: float = 1.0
    decay: bool = True
    frozen: bool = False


class Rule(NamedTuple):
    """A rule as it was parsed: which parameters (`path`, and `role` unless empty), and the fields of
    `Treatment` that it sets."""

    path: str
    role: str
    sets: dict

    def matches(self, path: str, role: str) -> bool:
        return fnmatch.fnmatchcase(path, self.path) and self.role in ("", role)


def parse_rule(text: str) -> Rule:
    """The rule that `text` says; ValueError with what is wrong."""
    where, sets = {}, {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if key in where or (key if equals else "frozen") in sets:
            raise ValueError(f"{text!r} says {key!r} twice")
        if key == "path" and value:
            where["path"] = value
        elif key == "role" and value:
            if value not in ROLES:
                raise ValueError(f"{text!r}: roles are {', '.join(ROLES)}")
            where["role"] = value
        elif key == "lr" and equals:
            sets["lr"] = _factor(text, value)
        elif key == "decay" and equals:
            if value not in ("0", "1"):
                raise ValueError(
                    f"{text!r}: decay is 0 or 1, whether optimizer.weight_decay applies"
                )
            sets["decay"] = value == "1"
        elif word in ("frozen", "trained"):
            sets["frozen"] = word == "frozen"
        else:
            raise ValueError(f"{text!r}: {word!r} is none of {WORDS}")
    if not where:
        raise ValueError(f"{text!r} names no parameters: begin with path= or role=")
    if not sets:
        raise ValueError(f"{text!r} sets nothing: lr=, decay=, frozen or trained is missing")
    if sets.get("frozen") and len(sets) > 1:
        raise ValueError(f"{text!r}: what is frozen has no lr and no decay")
    return Rule(where.get("path", "*"), where.get("role", ""), sets)


def _factor(text: str, value: str) -> float:
    try:
        factor = float(value)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise ValueError(f"{text!r}: lr is a factor above 0; 'frozen' stops learning")
    return factor


def treatments(groups: tuple[str, ...], roles: dict[str, str]) -> dict[str, Treatment]:
    """How each parameter is trained. Without rules: everything, with decay for all but vectors.

    Args:
      groups: the rules, as text.
      roles: path -> role of every parameter.

    Raises:
      ValueError: a rule cannot be read or matches nothing, or nothing is left to train.
    """
    out = {path: Treatment(decay=role != "vector") for path, role in roles.items()}
    for text in groups:
        rule = parse_rule(text)
        matched = [path for path, role in roles.items() if rule.matches(path, role)]
        if not matched:
            raise ValueError(f"{text!r} matches no parameter; {_nearest(rule, roles)}")
        for path in matched:
            out[path] = out[path]._replace(**rule.sets)
    if all(t.frozen for t in out.values()):
        raise ValueError(
            "everything is frozen: a later rule with 'trained' leaves something to learn"
        )
    return out


def _nearest(rule: Rule, roles: dict[str, str]) -> str:
    if rule.path == "*":
        return f"this model has {', '.join(sorted(set(roles.values())))}"
    names = [name for name in rule.path.split("/") if name.strip("*")]

    def likeness(path: str) -> float:
        parts = path.split("/")
        return sum(max(difflib.SequenceMatcher(None, n, p).ratio() for p in parts) for n in names)

    return f"the nearest paths are {', '.join(sorted(roles, key=likeness, reverse=True)[:3])}"

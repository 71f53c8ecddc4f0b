"""The string form of policies: ``entropy > 0.35``, ``margin < 0.2 & calls <= 500``, ``~always | random(0.1, seed=7)``.

The operator ``~`` is applied first, then ``&``, then ``|``. Parentheses change this order. A comparison or a call starts with the
name of a registered policy or limit. The class of the policy defines which comparison operator is allowed. A number in a
comparison may have the unit ``nats``.
"""

import inspect
from functools import cache

from lark import Lark, Token, Transformer, UnexpectedInput, UnexpectedToken, v_args
from lark.exceptions import VisitError

from cascadevlm.base.entry_points import installed, load, nearest
from cascadevlm.base.errors import CascadeError, PolicyError
from cascadevlm.policies.base import Limit, Policy, as_policy

GRAMMAR = r"""
?start: either
?either: both ("|" both)*
?both: inverse ("&" inverse)*
?inverse: "~" inverse -> invert
        | "(" either ")"
        | NAME OPERATOR NUMBER UNIT? -> compare
        | NAME ["(" [argument ("," argument)*] ")"] -> call
argument: [NAME "="] NUMBER
UNIT.2: "nats"
OPERATOR: "<=" | ">=" | "==" | "<" | ">"
NAME: /[A-Za-z_]\w*/
NUMBER: /[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?/
%ignore /\s+/
"""

_WORDS = {
    "NAME": "a policy",
    "NUMBER": "a number",
    "OPERATOR": "a comparison",
    "UNIT": "'nats'",
    "LPAR": "'('",
    "RPAR": "')'",
    "TILDE": "'~'",
    "COMMA": "','",
    "EQUAL": "'='",
    "VBAR": "'|'",
    "__ANON_0": "'|'",
    "AMPERSAND": "'&'",
    "$END": "the end",
}


def parse_policy(text: str) -> Policy:
    """Make a policy from its string form.

    Raises:
        PolicyError: if the text is wrong. The message shows the wrong word.
    """
    try:
        tree = _parser().parse(text)
        policy = _Builder(text).transform(tree)
    except UnexpectedInput as exc:
        ended = isinstance(exc, UnexpectedToken) and exc.token.type == "$END"
        column = len(text.rstrip()) if ended else exc.column - 1
        expected = exc.accepts if isinstance(exc, UnexpectedToken) else getattr(exc, "allowed", None)
        words = sorted({_WORDS.get(name, name) for name in expected or ()})
        raise _pointing(text, column, f"expected {' or '.join(words)}") from exc
    except VisitError as exc:
        if isinstance(exc.orig_exc, CascadeError):
            raise exc.orig_exc from exc
        raise
    assert isinstance(policy, Policy)
    return policy


@cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr")


def _pointing(text: str, column: int, message: str, hint: str = "") -> PolicyError:
    return PolicyError(f"Policy {text!r:.200}, column {column + 1}: {message}.", hint=hint)


def _value(token: Token) -> float:
    return (
        int(token) if token.lstrip("+-").isdigit() and len(token) < 19 else float(token)
    )  # Python refuses to convert very long numbers to int


@v_args(inline=True)
class _Builder(Transformer[Token, Policy]):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text

    def either(self, first: Policy, *more: Policy) -> Policy:
        for policy in more:
            first = first | policy
        return first

    def both(self, first: Policy, *more: Policy) -> Policy:
        for policy in more:
            first = first & policy
        return first

    def invert(self, policy: Policy) -> Policy:
        return ~policy

    def argument(self, name: Token | None, number: Token) -> tuple[str | None, float]:
        return (str(name) if name else None), _value(number)

    def compare(self, name: Token, operator: Token, number: Token, unit: Token | None = None) -> Policy:
        policy = self._class(name)
        if policy.comparison is None:
            raise self._error(name, f"{name!s} has no comparison with a number")
        if operator != policy.comparison:
            raise self._error(operator, f"{name!s} needs the operator {policy.comparison!r}, not {operator.value!r}")
        return self._build(name, policy, [_value(number)], {"unit": str(unit)} if unit else {})

    def call(self, name: Token, *arguments: tuple[str | None, float] | None) -> Policy:
        policy = self._class(name)
        if policy.comparison is not None:
            raise self._error(name, f"{name!s} needs a comparison, such as '{name!s} {policy.comparison} 0.5'")
        given = [argument for argument in arguments if argument is not None]
        positional = [value for key, value in given if key is None]
        return self._build(name, policy, positional, {key: value for key, value in given if key is not None})

    def _class(self, name: Token) -> type[Policy] | type[Limit]:
        try:
            return load_policy_class(str(name))
        except PolicyError as exc:
            raise self._error(name, exc.args[0].rstrip("."), exc.hint) from exc

    def _build(
        self, name: Token, policy: type[Policy] | type[Limit], values: list[float], named: dict[str, float] | dict[str, str]
    ) -> Policy:
        try:
            inspect.signature(policy).bind(*values, **named)
            return as_policy(policy(*values, **named))
        except TypeError as exc:
            raise self._error(name, f"{name!s}: {exc}") from exc
        except PolicyError as exc:
            raise self._error(name, exc.args[0].rstrip("."), exc.hint) from exc

    def _error(self, token: Token, message: str, hint: str = "") -> PolicyError:
        return _pointing(self.text, (token.column or 1) - 1, message, hint)


def load_policy_class(name: str) -> type[Policy] | type[Limit]:
    """The policy or limit that is registered under a name.

    Raises:
        PolicyError: if no object is registered under this name, or if the object is not a subclass of Policy or Limit.
    """
    points = installed("policies")
    if name not in points:
        raise PolicyError(f"There is no policy {name!r}.", hint=nearest(name, points))
    loaded = load(points[name])
    if not (isinstance(loaded, type) and issubclass(loaded, Policy | Limit)):
        raise PolicyError(
            f"Policy {name!r} ({points[name].value}) is not a subclass of Policy or Limit.",
            hint="Correct the entry point: it must name such a class.",
        )
    return loaded

"""A policy of somebody's own: the functions they wrote, and for all others those of a policy that is here.

Their functions are asked like any policy's. What one raises, or answers that cannot be, is told as Broken: which
function, what, and in which line. Where the code comes from is not decided here.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any, NamedTuple

from infinillm.core.policy import POLICIES, Policy
from infinillm.core.policy.orders import MoveBlocks
from infinillm.core.types import Ledger, Refused
from infinillm.errors import BadRequest, Broken


class Asked(NamedTuple):
    """What one function of a policy is given, and what it answers with, in words."""

    takes: str
    answers: str


FUNCTIONS = {
    "route": Asked("ledger, prompt_tokens, longest_tokens, block_size, exclude", "a node of the ledger, or Refused"),
    "reach": Asked("ledger, node, block_size", "a number of tokens"),
    "capacity": Asked("ledger, block_size", "a number of tokens"),
    "creditors": Asked("ledger, node, blocks, exclude, outgrown", "a list of (node, blocks), or Refused"),
    "plan": Asked("ledger, costs, block_size", "a tuple of MoveBlocks"),
}
TRUTHS = ("SHARES", "SAVES")


def made(name: str, values: Mapping[str, object]) -> Policy:
    """The policy that these definitions make, those of a file for instance. Raises BadRequest.

    They are some of `route`, `reach`, `capacity`, `creditors`, `plan`, SHARES and SAVES, as `Policy` has them; of what
    is missing, the policy that BASE names has its own. NAME is what people call it, else it is `name`.
    """
    wanted = (*FUNCTIONS, *TRUTHS)
    if not any(each in values for each in FUNCTIONS):
        raise BadRequest(f"policy {name} defines none of {', '.join(FUNCTIONS)}", field="policy")
    lacking = [each for each in wanted if each not in values]
    if lacking and "BASE" not in values:
        message = f'policy {name} does not define {", ".join(lacking)}, nor whose to take, such as BASE = "pooled"'
        raise BadRequest(message, field="policy")
    base = values.get("BASE", "pooled")
    if str(base) not in POLICIES:
        raise BadRequest(f"BASE of policy {name} must be one of {', '.join(POLICIES)}, not {base!r}", field="policy")
    mine: dict[str, Any] = {each: _checked(name, each, values[each]) for each in FUNCTIONS if each in values}
    mine |= {each.lower(): bool(values[each]) for each in TRUTHS if each in values}
    return replace(POLICIES[str(base)], name=str(values.get("NAME", name)), **mine)


def _checked(policy: str, label: str, function: object) -> Callable[..., Any]:
    """The function, whose failures and wrong answers are told."""
    takes, answers = FUNCTIONS[label]
    if not callable(function):
        raise BadRequest(f"{label} of policy {policy} must be a function, not {function!r:.40}", field="policy")
    try:
        inspect.signature(function).bind(*takes.split(", "))
    except TypeError:
        raise BadRequest(f"{label} of policy {policy} must take ({takes})", field="policy") from None

    @wraps(function)
    def ask(ledger: Ledger, *more: Any) -> Any:
        try:
            found = function(ledger, *more)
        except Exception as error:
            raise Broken(f"policy {policy}: {label} raised {said(error)}") from error
        if not _fits(label, ledger, found):
            raise Broken(f"policy {policy}: {label} answered {found!r:.80}, which is not {answers}")
        return found

    return ask


def _fits(label: str, ledger: Ledger, found: Any) -> bool:
    match label:
        case "reach" | "capacity":
            return isinstance(found, int)
        case "plan":
            return isinstance(found, tuple) and all(isinstance(order, MoveBlocks) for order in found)
        case "route":
            return isinstance(found, Refused) or (isinstance(found, str) and found in ledger.nodes)
    offers = found if isinstance(found, list) else ()
    known = all(isinstance(each, tuple) and len(each) == 2 and each[0] in ledger.nodes for each in offers)
    return isinstance(found, Refused) or (isinstance(found, list) and known)


def said(error: Exception) -> str:
    """An error in one line: of what kind, what it says, and in which line of which file."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}" + ("" if isinstance(error, SyntaxError) else where)

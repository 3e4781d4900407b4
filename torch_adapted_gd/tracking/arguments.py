"""Arguments and results of functions: the tensors among them, and calls with other tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

Key = int | str | tuple[int, int]  # an operand: its number, its keyword, or its place in a list with that number


def tensors_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Key, Tensor]]:
    """The tensors among arguments, also those in lists, with their keys."""
    for number, value in enumerate(args):
        if isinstance(value, Tensor):
            yield number, value
        elif isinstance(value, (tuple, list)):
            for place, inner in enumerate(value):
                if isinstance(inner, Tensor):
                    yield (number, place), inner
    for name, value in kwargs.items():
        if isinstance(value, Tensor):
            yield name, value


def results_of(result: Any) -> list[Tensor]:
    """The tensors among the results of a function."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, (tuple, list)):
        return [tensor for tensor in result if isinstance(tensor, Tensor)]
    return []


def detached(value: Any) -> Any:
    """An argument without its graph; also for lists and tuples of tensors."""
    if isinstance(value, Tensor):
        return value.detach()
    if type(value) in (tuple, list):
        return type(value)(map(detached, value))
    return value


def changes_in_place(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function changes its first operand."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__index__", "__invert__", "__int__"))
    return name.endswith("_") or kwargs.get("inplace") is True


def replaced(args: Sequence[Any], kwargs: dict[str, Any], values: Mapping[Key, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Arguments with some operands replaced; tuples stay tuples, because an index has to be one."""
    given, by_name = list(args), dict(kwargs)
    for key, value in values.items():
        if isinstance(key, str):
            by_name[key] = value
        elif isinstance(key, int):
            given[key] = value
        else:
            number, place = key
            inner = given[number]
            given[number] = type(inner)([*inner[:place], value, *inner[place + 1 :]])
    return given, by_name


def called(function: Callable[..., Any], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The result of a function. If it changes its first operand, the result is a changed copy of that."""
    if not changes_in_place(function, kwargs):
        return function(*args, **kwargs)
    changed = args[0].clone()
    function(changed, *args[1:], **kwargs)
    return changed

"""What the converters of files share: options beside arrays, errors that name the file, writing."""

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from gru_jax import _arguments
from gru_jax._params import AFTER, OPTION_CHECKS, RECURRENT_BIAS, GRUParams


def assemble(
    arrays: Mapping[str, Any], saved: Mapping[str, str], asked: Mapping[str, Any]
) -> GRUParams:
    """Returns checked parameters from arrays in our order, and options from two places.

    Args:
      arrays: the leaves that are there.
      saved: options that stand beside the arrays, any of the three.
      asked: options of the caller, None where the caller leaves it open.
    """
    options: dict[str, Any] = {}
    for option, check in OPTION_CHECKS.items():
        values = (saved.get(option), asked[option])
        given = [check(option, value) for value in values if value is not None]
        if len(set(given)) > 1:
            raise ValueError(
                f"{option} is saved as {given[0]!r}, which {option}={given[1]!r} contradicts. "
                "Leave the argument out."
            )
        if given:
            options[option] = given[0]
    if "reset_gate_mode" not in options:
        two_biases = len(arrays["bias"]) == 2 * len(arrays["recurrent_weights"])
        options["reset_gate_mode"] = RECURRENT_BIAS if two_biases else AFTER
    params = GRUParams(**arrays, **options)
    _arguments.sizes_of(params)
    return params


def names_of_options(params: GRUParams) -> dict[str, str]:
    """Returns the three options as text for a file, which can hold no function."""
    options = {option: getattr(params, option) for option in OPTION_CHECKS}
    for option, value in options.items():
        if not isinstance(value, str):
            raise ValueError(
                f"{option} must be a name, because a file holds no functions; got {value!r}. "
                f"Save params.replace({option}=...) and put the function back after reading."
            )
    return options


class Foreign(NamedTuple):
    """What stands in a file and is of no use outside the program that wrote it, or here."""

    kind: str


class Lazy(Mapping):
    """Names, and values that are read when they are asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], Any]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Any:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def __contains__(self, name: object) -> bool:
        return name in self._readers


class ContentError(ValueError):
    """A file was understood, and what it holds is not what is needed."""


@contextlib.contextmanager
def parsing(expected: str) -> Iterator[None]:
    """Makes one error of all that a foreign parser raises on content that it cannot read."""
    try:
        yield
    except ContentError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ContentError(
            f"it must be {expected}, and cannot be read as one ({type(error).__name__}: {reason}). "
            "Save it again."
        ) from error


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    """Makes a ValueError that names the file of every refusal."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def write(file: str | os.PathLike, data: bytes) -> None:
    """Writes a file wholly or not at all: a failure leaves the old one as it was."""
    target = os.path.realpath(file)
    beside = f"{target}.{secrets.token_hex(4)}.tmp"
    try:
        with open(beside, "xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(beside)
        raise

"""Every failure as an exit code and one line that says what to do."""

from typing import Any

import typer

from symgeo.errors import is_out_of_memory

# typer carries its own copy of click since 0.26; these are the classes of whichever it uses
UsageError: Any = typer.BadParameter.__base__
ClickException: Any = UsageError.__base__

OUT_OF_MEMORY = "out of memory: take fewer or smaller batches (--batches, --batch-size), or another --device"


class Failure(Exception):
    """A command that ran to its end and did not succeed; the message is for the user."""


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and the line that ends it.

    >>> explain(ValueError("rho must be a finite number >= 0; got -1"))
    (1, 'rho must be a finite number >= 0; got -1')
    >>> explain(KeyboardInterrupt())
    (130, 'interrupted')
    """
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return 130, "interrupted"
    if isinstance(error, UsageError):
        return 2, _one_line(f"{_usage_message(error)}; {_help_hint(error)}")
    return 1, _one_line(_message(error))


def _message(error: BaseException) -> str:
    if isinstance(error, ClickException):
        return error.format_message()
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file'}: {error.strerror.lower()}; choose another path or fix its permissions"
    if isinstance(error, ModuleNotFoundError) and error.name and str(error).startswith("No module named"):
        return f"the Python package {error.name!r} is needed here: pip install it, then run this again"
    if isinstance(error, (Failure, ValueError, OSError, ImportError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}; SYMGEO_TRACEBACK=1 shows where it comes from"


def _usage_message(error: Any) -> str:
    # typer hands on the wording of the library that checks the values
    message: str = error.format_message().replace("Value error, ", "").rstrip(".")
    return message


def _help_hint(error: Any) -> str:
    path = error.ctx.command_path if error.ctx is not None else "symgeo"
    return f"'{path} --help' lists what it takes"


def _one_line(text: str) -> str:
    return " ".join(text.split())

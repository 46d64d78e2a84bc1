"""The command line.  Nothing heavy is imported before a command runs, so that the help is instant."""

import os
import sys
import traceback
from collections.abc import Sequence

from symgeo.cli.app import app
from symgeo.cli.errors import UsageError, explain


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 1 failed, 2 wrong usage, 130 interrupted.

    Every error ends with one line on standard error that says what to do.  With ``SYMGEO_TRACEBACK=1`` in the
    environment the traceback of a failure comes before it.
    """
    from typer.main import get_command

    # idle OpenMP threads that spin make small models 20 times slower wherever the cores are shared
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        code = get_command(app).main(arguments, prog_name="symgeo", standalone_mode=False)
        if code != 130:
            return code if isinstance(code, int) else 0
        raise KeyboardInterrupt
    except (Exception, KeyboardInterrupt) as error:
        code, line = explain(error)
        if isinstance(error, UsageError) and error.ctx is not None:
            print(error.ctx.get_usage(), file=sys.stderr)
        elif os.environ.get("SYMGEO_TRACEBACK") == "1":
            traceback.print_exception(error)
        print(f"symgeo: {line}", file=sys.stderr)
        return code


__all__ = ["app", "main"]

"""An error that the user can mend is one line, not a traceback."""

import sys


class UserError(Exception):
    """Something the user can change: a wrong name, a missing file, an impossible combination. Its text is one line."""


def run_main(main) -> None:
    """Call ``main()``; a ``UserError`` becomes one line on standard error and exit status 1."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `python tokenizer.py | head` is no error
        sys.stderr.close()

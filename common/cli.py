"""What every command here shares: a user's mistake is told in one line on stderr, and the exit status says so."""

import os
import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Call `main()`; a ValueError or OSError ends as one line and exit status 1, Ctrl-C as status 130.

    Anything else is our own bug and keeps its traceback.
    """
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # Our reader has left, as in `... | head`: no complaint, and none from the final flush either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)

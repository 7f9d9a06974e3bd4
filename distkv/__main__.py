"""`python -m distkv` is the command `distkv`, and the script of that name begins here too.

From here on Ctrl-C ends it with exit code 130 and without a traceback, while modules are imported and while Python
takes its leave too.
"""

import signal
import sys


def main() -> None:
    """Runs the command line; see `distkv.commands.main.main`."""
    try:
        from distkv.commands.main import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
            signal.signal(signal.SIGINT, signal.SIG_DFL)


if __name__ == "__main__":
    main()

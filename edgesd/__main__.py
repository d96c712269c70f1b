"""The `edgesd` command, and `python -m edgesd`."""

import os
import sys

TYPE_CHECKING = False  # not that of `typing`: Ctrl-C while it is imported would be a traceback
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> "NoReturn":
    """Run the command line. Ctrl-C is one line from the first import on."""
    try:
        from edgesd.cli import main as run

        run()
    except KeyboardInterrupt:  # before or after `run` itself turns it into a line
        os.write(2, b"edgesd: interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    here, root = os.getcwd(), os.path.dirname(os.path.dirname(__file__))  # noqa: PTH109, PTH120
    # Python puts the current folder first: unless it is edgesd's own, nothing is imported from it.
    if sys.path[:1] == [here] and here != root:
        del sys.path[0]
    main()

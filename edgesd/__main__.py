"""python -m edgesd: the `edgesd` command."""

import os
import sys

if __name__ == "__main__":
    here, root = os.getcwd(), os.path.dirname(os.path.dirname(__file__))  # noqa: PTH109, PTH120
    # Python puts the current folder first: unless it is edgesd's own, nothing is imported from it.
    if sys.path[:1] == [here] and here != root:
        del sys.path[0]
    from edgesd.cli import main

    main()

"""python -m edgesd: the `edgesd` command."""

from edgesd.cli import main

if __name__ == "__main__":
    main()

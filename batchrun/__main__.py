"""`python -m batchrun`: the command line."""

from batchrun.cli import main

if __name__ == "__main__":
    main()

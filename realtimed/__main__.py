"""`python -m realtimed` is the command `realtimed`."""

from realtimed.cli.realtimed import main

if __name__ == "__main__":
    main()

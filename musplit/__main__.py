"""`python -m musplit` is `musplit`."""

from musplit.cli import main

if __name__ == "__main__":
    main()

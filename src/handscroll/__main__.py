"""`python -m handscroll`."""

from handscroll.cli.main import main

if __name__ == "__main__":
    main()

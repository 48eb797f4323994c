"""`python -m handscroll`."""

from handscroll.cli import main

if __name__ == "__main__":
    main()

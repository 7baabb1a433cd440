"""`python -m kdpipe`."""

from kdpipe import main

if __name__ == "__main__":
    main()

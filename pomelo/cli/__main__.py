"""`python -m pomelo.cli` is `pomelo`."""

from pomelo.cli import main

if __name__ == "__main__":
    main()

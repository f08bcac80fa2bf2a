"""`python -m ferrum`."""

import sys

if __name__ == "__main__":
    try:
        from ferrum.cli import main

        status = main()
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)

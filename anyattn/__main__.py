"""`python -m anyattn`, the same as the script `anyattn`."""

import sys

from anyattn.cli import main

if __name__ == "__main__":
    sys.exit(main())

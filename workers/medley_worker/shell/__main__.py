"""`python -m medley_worker.shell`."""

import sys

from medley_worker.shell.main import main

if __name__ == "__main__":
    sys.exit(main())

"""`python -m tiller`, and with it `accelerate launch -m tiller train recipe.yaml`."""

import sys

from tiller.cli import main

if __name__ == "__main__":
    sys.exit(main())

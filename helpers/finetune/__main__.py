"""`accelerate launch -m helpers.finetune ...` is `python -m helpers finetune ...` in several processes."""

import sys

from ..cli.app import main

sys.argv.insert(1, "finetune")
main()

"""`.venv/bin/python analysis/scaling` runs this; command.py has the command line."""

import sys
from pathlib import Path

# So that this folder is a package beside plot.py, wherever the command is given.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scaling.command import main

sys.exit(main())

"""`.venv/bin/python analysis/scaling` runs this; command.py has the command line."""

import sys
from pathlib import Path

# Makes this folder a package beside plot.py, from whatever folder the command is run.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scaling.command import main

sys.exit(main())

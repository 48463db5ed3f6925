"""How far Lockstep scales: the cost of a step, fitted to some runs, checked on others, and drawn.

`runs` reads run directories, `cost` is the model of a step, `fit` fits it to runs, `clusters` holds
published figures of GPUs and links, `draw` makes the pictures, `command` is the command line.
"""

import plot  # noqa: F401  # first: it says how to install what is missing

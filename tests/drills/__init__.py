"""The disturbances of real runs that launch/faults makes: what is done, and what must be seen."""

from drills import cluster, ranks, storage

DRILLS = [*storage.DRILLS, *ranks.DRILLS, *cluster.DRILLS]

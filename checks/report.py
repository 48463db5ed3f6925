"""How a check or a drill ends, if not well, and its table for people."""


class NotRun(Exception):
    """What this machine cannot show, and why."""


class Failed(Exception):
    """What was promised and was not seen, and the job whose log shows why, if it was one."""

    def __init__(self, reason, job=None):
        # The record is to say it, too: it may be all that is left of a machine.
        said = job.complaint() if job else ""
        super().__init__(f"{reason}: {said}" if said else reason)
        self.job = job


def aligned(rows):
    """Rows of texts as lines with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]

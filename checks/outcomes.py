"""How a check or a drill can fail to pass, and its table for people."""


class NotRun(Exception):
    """This machine cannot show something; the message says why."""


class Failed(Exception):
    """A promise was not kept. If a job broke it, `job` is the one whose log shows why."""

    def __init__(self, reason, job=None):
        # The record must contain this too: it may be all that is left of a machine.
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

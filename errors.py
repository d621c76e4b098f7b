"""The one exception that means: the user asked for something that cannot be.

Code in any room raises it with a single line that names what was wrong and what would be right; `edit.py` and
`train.py` print that line without a traceback and exit with 1. Every other exception is a defect of ours and
keeps its traceback.
"""


class InputError(ValueError):
    """A user's mistake, told in one line."""

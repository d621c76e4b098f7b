"""The error of a user's mistake.

Any room raises it with a single line that names the mistake and a right choice. `edit.py` and `train.py` print that
line without a traceback and exit with 1. Every other exception is a defect of this code and keeps its traceback.
"""


class InputError(ValueError):
    """A user's mistake, in one line."""

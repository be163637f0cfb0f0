"""The user's mistakes, as opposed to ours.

A UserError says what is wrong and what to do about it in a single line. The
programs print that line and stop with status 2, without a traceback; see
run_folder.run_main.
"""


class UserError(ValueError):
  r"""A mistake of the person who typed the command, with its remedy.

  Args:
    message: what is wrong, the value, and what to do; line breaks and runs of
      spaces become single spaces.

  Example:
    >>> str(UserError('no such dataset:\n  mnits'))
    'no such dataset: mnits'
  """

  def __init__(self, message: str):
    super().__init__(' '.join(message.split()))

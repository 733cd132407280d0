"""Runs snippets of Python, one after the other, inside the environment where the wheel is installed.

Importing vLLM takes ten seconds; so one process does it once. A line in is a snippet as JSON, a line out is a pair:
whether it ended well, and what it printed. What libraries print goes to standard error.
"""

import contextlib
import io
import json
import os
import sys
import traceback

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

for line in sys.stdin:
    printed, fine = io.StringIO(), True
    with contextlib.redirect_stdout(printed):
        try:
            exec(json.loads(line), {"__name__": "a snippet"})
        except Exception:
            fine = False
            print(traceback.format_exc())
    print(json.dumps((fine, printed.getvalue())), file=answers, flush=True)

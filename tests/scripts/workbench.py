"""Run snippets of Python, one after the other, in an environment where the wheel is installed.

Importing vLLM takes ten seconds, so one process imports it once. An input line is a snippet as JSON. An output line is
a pair: true if the snippet succeeded, and its output. Other output of libraries goes to standard error.
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
    printed, succeeded = io.StringIO(), True
    with contextlib.redirect_stdout(printed):
        try:
            exec(json.loads(line), {"__name__": "a snippet"})
        except Exception:
            succeeded = False
            print(traceback.format_exc())
    print(json.dumps((succeeded, printed.getvalue())), file=answers, flush=True)

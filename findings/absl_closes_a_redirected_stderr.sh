#!/usr/bin/env bash
# absl-py 2.5.1, which rouge-score 0.1.2 imports: `absl.logging` keeps the stream that is `sys.stderr` when it is imported,
# and its handler closes that stream when logging is set up anew (`logging.config.dictConfig`, as `import submitit` 1.5.4
# does), unless it is `sys.stderr`, `sys.stdout` or one of the originals by then. So where stderr went to a file while
# ROUGE was first computed (a job's log, a test's captured output) that file is closed under its owner by an import later
# on, and the next write to it raises `ValueError: I/O operation on closed file`.
# What avoids it: have `sys.stderr` be `sys.__stderr__` while rouge-score is imported.
#
# Seen (Python 3.11): imported plainly: closed; imported with the original stderr in place: open
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet absl-py==2.5.1 rouge-score==0.1.2 submitit==1.5.4
cat >"$folder/streams.py" <<'PY'
import contextlib
import io
import sys

log = sys.stderr = io.StringIO()
guard = contextlib.redirect_stderr(sys.__stderr__) if sys.argv[1] == "guarded" else contextlib.nullcontext()
with guard:
    import rouge_score.rouge_scorer
sys.stderr = sys.__stderr__
import submitit

print(sys.argv[1], "closed" if log.closed else "open")
PY
seen=$("$folder/venv/bin/python" "$folder/streams.py" plain; "$folder/venv/bin/python" "$folder/streams.py" guarded)
echo "$seen"
[ "$seen" = $'plain closed\nguarded open' ]

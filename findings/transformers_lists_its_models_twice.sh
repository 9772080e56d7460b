#!/usr/bin/env bash
# transformers 5.23.0: `import transformers` opens the source of every model (some 3,000 files) to read its `__all__`, and the
# first import of anything below `transformers.models`, as of any model, opens each of them once more. The function that
# reads a folder is an `lru_cache` of the default 128 entries, and there are some 550 folders: of the first reading nothing
# but the whole is left when the second begins, and that is asked for under another name (a Path, then a str).
# The second reading takes about half a second of CPU of each process that loads a model.
# What avoids it: give `transformers.utils.import_utils.create_import_structure_from_path` the kept whole, which its cache
# still has under the Path, before `transformers.models` is imported.
#
# Seen (Python 3.11, without PyTorch):
#   import transformers: each file once; import transformers.models: each once more; with the kept whole: none
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0
cat >"$folder/count.py" <<'PY'
import sys
from collections import Counter
from pathlib import Path

seen = Counter()


def note(event, arguments):
    name = str(arguments[0]) if event == "open" else ""
    if "/transformers/models/" in name and name.endswith(".py"):
        seen[name] += 1


sys.addaudithook(note)
import transformers  # noqa: E402
from transformers.utils import import_utils  # noqa: E402

first = dict(seen)
seen.clear()
if sys.argv[1] == "kept":
    models = Path(transformers.__file__).parent / "models"
    read, whole = import_utils.create_import_structure_from_path, import_utils.create_import_structure_from_path(models)
    import_utils.create_import_structure_from_path = lambda path: whole if "__init__" in str(path) else read(path)
import transformers.models  # noqa: E402

again = sum(name in seen for name in first)
again_share = again / len(first)
once = Counter(first.values())[1] / len(first)
print(len(first), Counter(first.values()), again, file=sys.stderr)
print("once", once > 0.99, "again", "all" if again_share > 0.99 else "none" if again_share < 0.01 else again)
PY
for case in "plain=once True again all" "kept=once True again none"; do
  got=$("$folder/venv/bin/python" "$folder/count.py" "${case%%=*}" 2>>"$folder/log")
  echo "${case%%=*}: $got"
  [ "$got" = "${case#*=}" ] || { cat "$folder/log"; exit 1; }
done

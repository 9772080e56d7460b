#!/usr/bin/env bash
# pandas 3.1.1 beside 2.3.3: `astype(str)` on a column with missing values. pandas 2 writes them out ("None", "nan"), so
# the result is often used as a key that stands for "no value" too (full fine-tuning has no rank). In pandas 3 they stay
# missing, and `groupby` on such a key leaves their rows out without a word: a mean over settings has a setting less, and
# nothing raises. `dropna=False`, or `map(str)`, keeps them.
#
# Seen:
#   2.3.3  str of None: 'None'    groups: ['4', 'None']  rows in groups: 3 of 3
#   3.1.1  str of None: missing   groups: ['4']          rows in groups: 2 of 3
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 2.3.3 3.1.1; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet "pandas==$version"
  "$folder/$version/bin/python" - <<'PY'
import sys

import pandas as pd

runs = pd.DataFrame({"rank": pd.Series(["4", None, "4"], dtype=object), "loss": [3.0, 2.0, 3.1]})
key = runs["rank"].astype(str)
groups = runs.groupby(key)["loss"].size()
kept = runs.groupby(runs["rank"].map(str))["loss"].size()
text = "missing" if pd.isna(key[1]) else repr(key[1])
print(f"{pd.__version__}  str of None: {text:8}  groups: {list(groups.index)}  rows in groups: {groups.sum()} of 3")
wanted = {"2": ("'None'", 3), "3": ("missing", 2)}[pd.__version__[0]]
sys.exit((text, groups.sum(), kept.sum()) != (*wanted, 3))
PY
done

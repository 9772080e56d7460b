#!/usr/bin/env bash
# transformers 5.23.0 and tqdm 4.70.1: a process that has loaded a model with `from_pretrained` can no more be forked
# without thought. The bar "Loading weights" leaves a thread behind (tqdm's monitor), and tqdm's default lock, a POSIX
# semaphore in shared memory which every forked process goes on using together. In words: where one of them is killed while
# it draws a bar, the semaphore is never given back, and each of the others waits in its next `from_pretrained` for ever;
# also with PEFT's `merge_and_unload()`, whose bar takes the lock even where it is not shown.
# What keeps them apart: `tqdm.set_lock(threading.RLock())` and `tqdm.monitor_interval = 0` before the first bar; or
# `transformers.utils.logging.disable_progress_bar()`, after which loading makes no bar at all.
#
# Seen (torch 2.13.0, Linux):
#   as it is: threads 2 semaphores 1
#   with a lock of its own: threads 1 semaphores 0
#   without bars: threads 1 semaphores 0
# Exits non-zero if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 tqdm==4.70.1
cat >"$folder/load.py" <<'PY'
import os
import sys
import threading

import transformers
from tqdm import tqdm

if sys.argv[2] == "with a lock of its own":
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
if sys.argv[2] == "without bars":
    transformers.utils.logging.disable_progress_bar()
folder = sys.argv[1]
if not os.path.exists(folder):
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    sys.exit()
transformers.LlamaForCausalLM.from_pretrained(folder)
semaphores = {line.split()[5] for line in open("/proc/self/maps") if "/dev/shm/sem." in line}
print("threads", sum(thread.is_alive() for thread in threading.enumerate()), "semaphores", len(semaphores))
PY
see() { OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/load.py" "$folder/model" "$1" 2>/dev/null; }
see "without bars"
for case in "as it is=threads 2 semaphores 1" "with a lock of its own=threads 1 semaphores 0" \
  "without bars=threads 1 semaphores 0"; do
  got=$(see "${case%=*}")
  echo "${case%=*}: $got"
  [ "$got" = "${case#*=}" ]
done

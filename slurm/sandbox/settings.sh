# Where the sandbox is and how it is reached; read by `up` and `down`.

FOLDER=${SLURM_SANDBOX:-/tmp/lorabench-slurm}   # a short path: it holds sockets, whose paths have at most 107 bytes
PORT=${SLURM_SANDBOX_PORT:-26817}               # the first of five

PORT_CONTROLLER=$PORT
PORT_ACCOUNTING=$((PORT + 1))
PORT_DATABASE=$((PORT + 2))
PORT_NODES=$((PORT + 3))                        # and the next
NODES="n1 n2"
GPUS=2                                          # of each node

export SLURM_CONF=$FOLDER/etc/slurm.conf

say() { printf '[%5.1f s] %s\n' "$(elapsed)" "$*"; }
fail() { say "FAILED: $*" >&2; exit 1; }
elapsed() { awk -v now="$(date +%s.%N)" -v begin="$BEGIN" 'BEGIN { print now - begin }'; }
BEGIN=$(date +%s.%N)

# pid NAME PROGRAM: the process that was started under this name, if it is still that program
pid() {
  local id
  id=$(cat "$FOLDER/pid/$1" 2>/dev/null) && [ -n "$id" ] || return 1
  { tr '\0' ' ' <"/proc/$id/cmdline"; } 2>/dev/null | grep -q "$2" && echo "$id"
}

# gone PID: a process that has ended; one that is only just being started has not
gone() {
  [ ! -d "/proc/$1" ] || [ "$(awk '/^State/ { print $2 }' "/proc/$1/status" 2>/dev/null)" = Z ]
}

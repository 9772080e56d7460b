# Writes the sandbox's configuration below $FOLDER/etc; read by `up`, which sets $ADDRESS, $ACCOUNTING,
# $PREEMPT_SIGNAL and $CONTROL_GROUPS.

configure() {
  umask 022
  mkdir -p "$FOLDER"/{etc,run,pid,log,state,dev,database,tmp}
  chmod go+x "$FOLDER"   # munged insists
  local node gpu
  for node in $NODES; do mkdir -p "$FOLDER/spool/$node"; done
  for gpu in $(seq 0 $((GPUS - 1))); do ln -sfn /dev/null "$FOLDER/dev/gpu$gpu"; done   # SLURM wants a device
  if [ ! -s "$FOLDER/etc/munge.key" ]; then
    head -c 1024 /dev/urandom >"$FOLDER/etc/munge.key"
    chmod 600 "$FOLDER/etc/munge.key"
  fi
  { controller_settings; process_settings; accounting_settings; } >"$FOLDER/etc/slurm.conf"
  control_group_settings >"$FOLDER/etc/cgroup.conf"
  echo "NodeName=n[1-2] Name=gpu File=$FOLDER/dev/gpu[0-$((GPUS - 1))]" >"$FOLDER/etc/gres.conf"
  (umask 077; database_daemon_settings >"$FOLDER/etc/slurmdbd.conf")
  database_statements >"$FOLDER/etc/init.sql"
}

# The delays are short, so that what takes minutes on a cluster can be watched in seconds.
controller_settings() {
  cat <<END
ClusterName=sandbox
SlurmctldHost=localhost($ADDRESS)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start again (default: 120 s)
AuthInfo=socket=$FOLDER/run/munge.sock,cred_expire=5
SlurmctldPort=$PORT_CONTROLLER
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPidFile=$FOLDER/run/slurmctld.pid
SlurmdPidFile=$FOLDER/run/slurmd.%n.pid
StateSaveLocation=$FOLDER/state
SlurmdSpoolDir=$FOLDER/spool/%n
SlurmctldLogFile=$FOLDER/log/slurmctld.log
SlurmdLogFile=$FOLDER/log/slurmd.%n.log
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
JobRequeue=1
ReturnToService=2
# from SIGTERM to SIGKILL at the time limit and at scancel
KillWait=10
# sandboxes share the names of their control groups, so those of their jobs must differ
FirstJobId=$((PORT * 100))
MinJobAge=300
InactiveLimit=0
SlurmctldTimeout=30
# a node that has not answered for so long is down, and its jobs are requeued (default: 300 s)
SlurmdTimeout=10
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
${PREEMPT_SIGNAL:+SlurmctldParameters=preempt_send_user_signal}
# the nodes are declared larger than the machine
SlurmdParameters=config_overrides
NodeName=n[1-2] NodeHostname=localhost NodeAddr=$ADDRESS Port=[$PORT_NODES-$((PORT_NODES + 1))] CPUs=4 RealMemory=8000 Gres=gpu:$GPUS State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE DefMemPerCPU=1000 PriorityTier=1 GraceTime=20 State=UP
PartitionName=high Nodes=n[1-2] MaxTime=INFINITE DefMemPerCPU=1000 PriorityTier=10 PreemptMode=OFF State=UP
END
}

process_settings() {
  if [ -n "$CONTROL_GROUPS" ]; then
    echo "ProctrackType=proctrack/cgroup"
    echo "TaskPlugin=task/cgroup"
  else
    echo "ProctrackType=proctrack/pgid"
    echo "TaskPlugin=task/none"
  fi
}

# A job that takes more memory than it has asked for is killed by the kernel, as on clusters.
control_group_settings() {
  cat <<END
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
ConstrainRAMSpace=yes
ConstrainSwapSpace=no
END
}

accounting_settings() {
  if [ -z "$ACCOUNTING" ]; then
    echo "AccountingStorageType=accounting_storage/none"
    return
  fi
  cat <<END
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$ADDRESS
AccountingStoragePort=$PORT_ACCOUNTING
# with munge this is the path of a socket: connections to slurmdbd do not obey AuthInfo
AccountingStoragePass=$FOLDER/run/munge.sock
AccountingStorageTRES=gres/gpu
END
}

database_daemon_settings() {
  cat <<END
AuthType=auth/munge
AuthInfo=socket=$FOLDER/run/munge.sock
DbdHost=localhost
DbdAddr=$ADDRESS
DbdPort=$PORT_ACCOUNTING
# not in slurmdbd.conf's manual page, but obeyed: without it slurmdbd listens on all addresses
CommunicationParameters=NoInAddrAny
SlurmUser=root
LogFile=$FOLDER/log/slurmdbd.log
PidFile=$FOLDER/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$PORT_DATABASE
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
END
}

database_statements() {
  cat <<END
CREATE DATABASE IF NOT EXISTS slurm_acct_db;
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
END
}

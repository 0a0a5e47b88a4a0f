#!/usr/bin/env bash
# slurm.sh up FOLDER [accounting] starts a local Slurm: two pretended nodes with 8 CPUs and 2 GPUs
# each, on the loopback interface. slurm.sh down FOLDER stops it, by the process ids in its files.
# It needs Debian's slurm-wlm and munge, and neither systemd nor root.
# With `accounting` (slurmdbd and mariadb-server) it has a database of jobs, and squeue forgets an
# ended job within seconds. Partition `main` preempts jobs of `low`, which are requeued.
# Put FOLDER/bin first in PATH, because Snakemake does not pass SLURM_CONF on.
set -euo pipefail
what=$1 home=$2 port=${SLURM_TEST_PORT:-$((20000 + RANDOM % 20000))}
export PATH=$PATH:/usr/sbin:/sbin

end() { # a daemon, by the file with its process id
    local id
    [ -s "$1" ] && id=$(cat "$1") || return 0
    kill "$id" 2>/dev/null || return 0
    for _ in $(seq 50); do kill -0 "$id" 2>/dev/null || return 0; sleep 0.1; done
    kill -9 "$id" 2>/dev/null || true
}

if [ "$what" = down ]; then
    timeout 10 "$home/bin/scancel" --user="$(id -un)" 2>/dev/null || true
    for file in "$home"/run/slurmd-*.pid "$home"/run/{slurmctld,slurmdbd,mariadbd}.pid \
        "$home/munge/pid"; do
        end "$file"
    done
    exit 0
fi
[ "$what" = up ] || { echo "usage: slurm.sh up|down FOLDER [accounting]" >&2; exit 2; }

if [ "${3:-}" = accounting ]; then
    age=2 jobs="AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 3))
AccountingStoragePass=$home/munge/socket"
else
    age=3600 jobs=AccountingStorageType=accounting_storage/none
fi
me=$(id -un) host=$(hostname -s) memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
mkdir -p "$home"/{bin,etc,run,log,state,dev,munge} "$home"/spool/{n1,n2}
chmod 755 "$home" && chmod 700 "$home/munge"
for command in sbatch srun scancel squeue scontrol sinfo sacct sacctmgr sshare; do
    printf '#!/bin/sh\nSLURM_CONF=%q exec %q "$@"\n' \
        "$home/etc/slurm.conf" "$(command -v "$command")" > "$home/bin/$command"
    chmod +x "$home/bin/$command"
done
# Without a device file CUDA_VISIBLE_DEVICES would stay empty.
ln -sfn /dev/null "$home/dev/nvidia0" && ln -sfn /dev/null "$home/dev/nvidia1"
cat > "$home/etc/slurm.conf" <<CONF
ClusterName=halfstep
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
# a requeued job waits until its credential has expired
AuthInfo=socket=$home/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool/%n
SlurmctldPidFile=$home/run/slurmctld.pid
SlurmdPidFile=$home/run/slurmd-%n.pid
SlurmctldLogFile=$home/log/slurmctld.log
SlurmdLogFile=$home/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
$jobs
MinJobAge=$age
KillWait=2
SlurmdTimeout=30
ReturnToService=1
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=DEFAULT CPUs=8 RealMemory=$memory Gres=gpu:2
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1))
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2))
PartitionName=main Nodes=n[1-2] PriorityTier=10 PreemptMode=off
PartitionName=low Nodes=n[1-2] PriorityTier=1 PreemptMode=requeue Default=YES
CONF
echo "NodeName=n[1-2] Name=gpu File=$home/dev/nvidia[0-1] AutoDetect=off" > "$home/etc/gres.conf"

(umask 077 && head -c 1024 /dev/urandom > "$home/munge/key")
munged --force --key-file="$home/munge/key" --socket="$home/munge/socket" \
    --pid-file="$home/munge/pid" --log-file="$home/munge/log" --seed-file="$home/munge/seed"
export SLURM_CONF=$home/etc/slurm.conf
if [ "${3:-}" = accounting ]; then
    base="--no-defaults --user=$me --datadir=$home/db"
    mkdir -m 700 "$home/db"
    mariadb-install-db $base --auth-root-authentication-method=normal --skip-test-db \
        > "$home/log/mariadb.log" 2>&1
    setsid mariadbd $base --skip-networking --socket="$home/run/mysql" \
        --pid-file="$home/run/mariadbd.pid" --innodb-buffer-pool-size=64M \
        --innodb-lock-wait-timeout=900 >> "$home/log/mariadb.log" 2>&1 &
    for _ in $(seq 100); do
        mariadb-admin --no-defaults -uroot -S "$home/run/mysql" ping > /dev/null 2>&1 && break
        sleep 0.2
    done
    (umask 077 && cat > "$home/etc/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$home/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 3))
SlurmUser=$me
LogFile=$home/log/slurmdbd.log
PidFile=$home/run/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
CommunicationParameters=NoInAddrAny
CONF
    )
    MYSQL_UNIX_PORT=$home/run/mysql slurmdbd
    for _ in $(seq 100); do
        timeout 5 sacctmgr --noheader show cluster > /dev/null 2>&1 && break
        sleep 0.2
    done
    sacctmgr --immediate add cluster halfstep > /dev/null
    sacctmgr --immediate add account halfstep > /dev/null
    sacctmgr --immediate add user "$me" Account=halfstep > /dev/null
fi
slurmctld
slurmd -N n1 && slurmd -N n2
for _ in $(seq 100); do
    idle=$(timeout 5 sinfo --noheader --Node --partition=main --states=idle 2>/dev/null | wc -l)
    [ "$idle" = 2 ] && exit 0
    sleep 0.2
done
sinfo >&2 || true
tail -n 20 "$home"/log/*.log >&2
exit 1

#!/usr/bin/env bash
# A Slurm of one node on this machine, with everything it writes in one folder: tests/slurm/start.sh FOLDER
#
# Needs Debian's slurmctld, slurmd, slurm-client and munge, and neither systemd, cgroups, a database nor anything in /etc.
# FOLDER/bin holds the client commands that talk to it: PATH=FOLDER/bin:$PATH sinfo. To end it: tests/slurm/stop.sh FOLDER
set -euo pipefail

mkdir -p "${1:?folder for the configuration, the state and the logs}"
folder=$(realpath "$1")
user=$(id -un)
host=$(hostname -s)
cpus=$(($(nproc) > 2 ? $(nproc) : 2)) # two processes must fit
read -r port_ctld port_d < <(python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(socket.getsockname()[1] for socket in sockets))')

mkdir -p "$folder"/{bin,state,spool,munge}
chmod 700 "$folder/munge"
head -c 1024 /dev/urandom > "$folder/munge/key"
chmod 600 "$folder/munge/key"

cat > "$folder/slurm.conf" << END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port_ctld
SlurmdPort=$port_d
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
# What a container without systemd and cgroups can do. Memory is whatever a job asks for.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
# No database: what finished stays visible to squeue. Cancelled jobs are gone within seconds.
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MinJobAge=3600
KillWait=5
SchedulerParameters=sched_interval=2,batch_sched_delay=1
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=1000000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END

for command in sbatch scancel scontrol sinfo squeue srun; do
    # Not by the environment: the executor plugin takes SLURM_* from the jobs it starts.
    printf '#!/bin/sh\nSLURM_CONF=%q exec %q "$@"\n' "$folder/slurm.conf" "$(command -v $command)" > "$folder/bin/$command"
    chmod 755 "$folder/bin/$command"
done

trap '"$(dirname "$0")/stop.sh" "$folder"' ERR # what did start, if something else does not
# --force: the folder may be below a world-writable /tmp.
munged --force --key-file="$folder/munge/key" --socket="$folder/munge/socket" --seed-file="$folder/munge/seed" \
    --pid-file="$folder/munge/pid" --log-file="$folder/munge/log"
export SLURM_CONF=$folder/slurm.conf
slurmctld
slurmd -N "$host"

for _ in $(seq 60); do
    if [ "$("$folder/bin/sinfo" --noheader --format %T 2> /dev/null)" = idle ]; then
        echo "$folder/bin"
        exit
    fi
    sleep 0.5
done
echo "the node is not idle after 30 s; the logs are in $folder" >&2
false

#!/usr/bin/env bash
# End the Slurm of tests/slurm/start.sh FOLDER, with the jobs that run in it.
set -uo pipefail
folder=$(realpath "${1:?the folder given to start.sh}")

"$folder/bin/scancel" --user "$(id -un)" 2> /dev/null
for _ in $(seq 100); do
    [ -n "$("$folder/bin/squeue" --noheader 2> /dev/null)" ] || break
    sleep 0.1
done
status=0
for pid in $(cat "$folder"/slurmctld.pid "$folder"/slurmd.pid "$folder"/munge/pid 2> /dev/null); do
    kill "$pid" 2> /dev/null
    for _ in $(seq 200); do
        kill -0 "$pid" 2> /dev/null || continue 2
        sleep 0.1
    done
    echo "process $pid does not end" >&2
    status=1
done
exit $status

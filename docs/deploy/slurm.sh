#!/bin/bash
# sbatch slurm.sh JOB.yaml: a scheduler, two kinds of workers and the submitter, for one run.
#SBATCH --job-name=mas-batch
#SBATCH --time=08:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --ntasks=1 --cpus-per-task=2 --mem-per-cpu=2G
#SBATCH hetjob
#SBATCH --ntasks=8 --cpus-per-task=4 --mem-per-cpu=2G
#SBATCH hetjob
#SBATCH --ntasks=2 --cpus-per-task=8 --mem-per-cpu=4G --gpus-per-task=1
set -euo pipefail
job=$1
shift

# Everybody on the network can reach the scheduler, and whoever talks to it runs code as you: a
# certificate for this run alone, which scheduler, workers and submitter share.
private=$(mktemp -d "$PWD/.mas-batch-${SLURM_JOB_ID}-XXXXXX")
openssl req -x509 -newkey rsa:2048 -nodes -days 7 -subj /CN=mas-batch \
    -keyout "$private/key.pem" -out "$private/cert.pem" 2>/dev/null
tls=DASK_DISTRIBUTED__COMM__TLS
export DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION=true DASK_DISTRIBUTED__COMM__DEFAULT_SCHEME=tls
export "${tls}__CA_FILE=$private/cert.pem"
for role in SCHEDULER WORKER CLIENT; do
    export "${tls}__${role}__CERT=$private/cert.pem" "${tls}__${role}__KEY=$private/key.pem"
done

workers=()
scheduler=
# shellcheck disable=SC2317,SC2329 # the trap calls it
clean_up() {
    # Workers first: they take leave of a scheduler that is still there.
    for process in "${workers[@]}" $scheduler; do
        kill "$process" 2>/dev/null || true
        wait "$process" 2>/dev/null || true
    done
    rm -rf "$private"
}
trap clean_up EXIT

cluster=$private/cluster.json
dask scheduler --protocol tls --port 0 --scheduler-file "$cluster" \
    --dashboard-address 127.0.0.1:0 --interface "${MAS_BATCH_INTERFACE:-eth0}" &
scheduler=$!
until [ -s "$cluster" ]; do # its address is in it when it listens
    kill -0 "$scheduler"    # it has ended: so does this script
    sleep 1
done

# --nthreads: partitions at once (transformers: 4), one that waits, and a merge.
# No dashboard: it would be open to the network.
start_workers() { # group of the heterogeneous job, the Dask resources that its workers declare
    srun --het-group="$1" dask worker --scheduler-file "$cluster" --resources "$2" --nthreads 6 \
        --no-dashboard --death-timeout 300 &
    workers+=($!)
}
start_workers 1 "summarize=1,small=1"
start_workers 2 "summarize=1,large=1,GPU=1"

mas-batch submit "$job" --scheduler-file "$cluster" --set cluster.wait_s=600 --json "$@" &
submitter=$!
trap 'kill -TERM "$submitter"' TERM # before the time is up, or at preemption: leave in order
status=0
wait "$submitter" || status=$?
# A wait that a signal cut short: now for the submitter's own exit code.
if [ "$status" -gt 128 ]; then status=0; wait "$submitter" || status=$?; fi
# 1: what is answered is kept, another try goes on from there.
if [ "$status" -eq 1 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"

#!/usr/bin/env bash
# Runs mpirun so that SIGTERM leaves the job the time to save.
#
#   launch/graceful.sh mpirun -n 4 python -m mpi4py launch/train_digits.py …
#
# OpenMPI's mpirun kills its ranks half a second after SIGTERM or SIGINT, and an ssh session that
# ends kills either mpirun. This hands all of these on as SIGUSR1, which both mpiruns pass to their
# ranks and then wait. Use it where something else decides what the job is sent: as a container's
# command, in a batch script, under a supervisor.
set -uo pipefail

"$@" &
job=$!
trap 'kill -USR1 "$job" 2>/dev/null' TERM INT HUP USR1 USR2

# `wait` ends with each signal, too; the job's own status is that of the wait after which it is gone.
while
    wait "$job"
    status=$?
    kill -0 "$job" 2>/dev/null
do :; done
exit "$status"

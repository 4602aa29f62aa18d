#!/usr/bin/env bash
# Runs the training job on the hosts of a hostfile, with OpenMPI or MPICH, whichever mpirun is.
#
#   launch/mpirun.sh hostfile --mesh dp=4,tp=2 --steps 300 --checkpoints /shared/runs/digits
#
# All after the hostfile goes to launch/train_digits.py. To resume, on these or other hosts, run it
# again with the same --checkpoints and a mesh of as many ranks as there are now.
#
#   RANKS=6 launch/mpirun.sh …     fewer ranks than there are slots
#   PYTHON=/opt/venv/bin/python    another interpreter; it must be there on every host
#
# kill -USR1 <pid of mpirun> asks the job to save and stop: both mpiruns pass that signal on to the
# ranks. So does MPICH's after SIGTERM; OpenMPI's leaves a quarter of a second: see graceful.sh.
set -euo pipefail

if [[ $# -lt 1 || ! -r $1 ]]; then
    echo "usage: ${0##*/} HOSTFILE [options of train_digits.py]; see launch/hostfile.example" >&2
    exit 2
fi
hostfile=$1
shift
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}

# "node1 slots=4" -> "node1:4", which is MPICH's spelling; a host without slots= takes one rank.
hosts=$(sed -E 's/#.*//; s/[[:space:]]+slots=/:/; s/[[:space:]]+//g; /^$/d; /:/!s/$/:1/' "$hostfile")
ranks=${RANKS:-$(awk -F: '{ sum += $2 } END { print sum + 0 }' <<<"$hosts")}

# One thread a rank: ranks that share a host would otherwise each use all of its cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-1}

# -m mpi4py: an exception on one rank ends the job instead of leaving the others waiting for it.
job=("$python" -m mpi4py "$here/train_digits.py" "$@")

case $(mpirun --version 2>&1) in
*"Open MPI"*)
    # -x takes a variable along to the other hosts. Bound to one core, as is OpenMPI's habit, a rank
    # would save in the background on the very core that it trains on; --map-by slot:PE=2 gives it two.
    #   --mca btl_tcp_if_include eth0    where hosts have networks that don't reach one another
    exec mpirun -n "$ranks" --hostfile "$hostfile" --bind-to none \
        -x OMP_NUM_THREADS -x OPENBLAS_NUM_THREADS "${job[@]}"
    ;;
*HYDRA*)
    # MPICH takes the whole environment along by itself.
    #   -iface eth0          the network to use
    #   -bind-to core:2      two cores a rank: one to train on, one to save on in the background
    translated=$(mktemp)
    trap 'rm -f "$translated"' EXIT
    echo "$hosts" >"$translated"
    mpirun -n "$ranks" -f "$translated" "${job[@]}"
    ;;
*)
    echo "mpirun is neither OpenMPI's nor MPICH's: $(command -v mpirun || echo not found)" >&2
    exit 1
    ;;
esac

#!/bin/bash
# HOSTS=node0:8,node1:8 launch/mpi.sh      (Open MPI; one process per GPU)
# Only the launcher of MPI is used: it starts the processes and tells each its rank.
set -eu
HOSTS=${HOSTS:?a list such as node0:8,node1:8}
FIRST=${HOSTS%%[:,]*}

# shellcheck disable=SC2016  # the rank is known only where the process runs
mpirun --host "$HOSTS" -x PATH -x FIRST="$FIRST" bash -c '
  export CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK
  exec moejax train \
    --coordinator="$FIRST:7777" \
    --num_processes="$OMPI_COMM_WORLD_SIZE" \
    --process_id="$OMPI_COMM_WORLD_RANK" \
    --config=experiments/quickstart.py \
    --workdir=runs/quickstart \
    --config.data.batch_size=64 \
    --config.mesh.data=-1 \
    --config.mesh.expert=8
'

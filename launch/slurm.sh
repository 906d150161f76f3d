#!/bin/bash
# sbatch launch/slurm.sh      (4 hosts of 8 GPUs, one process per GPU)
#SBATCH --job-name=moejax
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# SIGTERM to the processes two minutes before the time is over: all save the same step and leave.
#SBATCH --signal=TERM@120

# Every task sees the GPUs of its host; jax gives it the one of its local rank.
srun moejax train \
  --distributed=auto \
  --config=experiments/quickstart.py \
  --workdir=runs/quickstart \
  --config.train.steps=300 \
  --config.data.batch_size=64 \
  --config.mesh.data=-1 \
  --config.mesh.expert=8

# Stopped before its last step: queue the rest.
[ -d runs/quickstart/checkpoints/300 ] || scontrol requeue "$SLURM_JOB_ID"

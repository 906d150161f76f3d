#!/bin/bash
# TPU=my-pod ZONE=us-central2-b BUCKET=my-bucket launch/tpu.sh
# (Cloud TPU pod; moejax is installed on every worker, experiments/ lies in the home folder)
# The same command on every worker; jax asks the pod who the others are.
set -eu
gcloud compute tpus tpu-vm ssh "${TPU:?name of the TPU}" --zone="${ZONE:?its zone}" --worker=all --command="
  mkdir -p ~/runs && (mountpoint -q ~/runs || gcsfuse ${BUCKET:?a bucket for the runs} ~/runs) &&
  moejax train \
    --distributed=auto \
    --config=experiments/quickstart.py \
    --workdir=runs/quickstart \
    --config.data.batch_size=64 \
    --config.mesh.data=1 \
    --config.mesh.fsdp=-1
"

#!/bin/sh
# One run on several machines. Start it on each of them, with the same arguments:
#   NODES=2 HOST=first-machine sh docs/multi_node.sh sd35m_geneval --name run
# HOST: a machine that all others reach at PORT. GPUS: processes on this machine, all of its GPUs if not given.
# All machines must see the run's folder (output), for restarts and --resume.
# RESTARTS: how often the run may go on from its last checkpoint after a process or a machine has failed.
set -eu
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # a restart would meet the addresses of the processes before it
exec torchrun --nnodes "$NODES" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$HOST:${PORT:-29500}" --rdzv-id "${ID:-tdm-r1}" \
    -m tdm_r1 train "$@"

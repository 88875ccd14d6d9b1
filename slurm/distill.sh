#!/bin/bash
# The whole stream on the cluster:  sbatch slurm/distill.sh [CONFIG.yaml] [key=value ...]
#
# A small job that submits the real ones (teachers that are missing, then one job per stage, chained) and ends. Run it
# again at any time: finished work is not redone. Site names (partition, account) are settings: cluster.scheduler.partition=...
#SBATCH --job-name=hpc-cpd-distill
#SBATCH --ntasks=1
#SBATCH --time=00:10:00
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
config=configs/mt25.yaml
case ${1:-} in *=*) ;; *.yaml | *.yml) config=$1; shift ;; esac
exec .venv/bin/python -m hpc_cpd.launch --stage all --cluster slurm --config "$config" "$@"

#!/bin/bash
# Train the teachers on the cluster:  sbatch slurm/teachers.sh [CONFIG.yaml] [key=value ...]
#
# A small job that submits the real ones (an array with one element per teacher) and ends. Run it again at any
# time: finished teachers are not trained again. Site names (partition, account) are settings: cluster.scheduler.partition=...
#SBATCH --job-name=hpc-cpd-teachers
#SBATCH --ntasks=1
#SBATCH --time=00:10:00
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
config=configs/mt25.yaml
case ${1:-} in *=*) ;; *.yaml | *.yml) config=$1; shift ;; esac
exec .venv/bin/python -m hpc_cpd.launch --stage teachers --cluster slurm --config "$config" "$@"

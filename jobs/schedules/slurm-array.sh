#!/usr/bin/env bash
# A week of days, two at a time, one GPU each:  LAKE=s3://lake FIRST_DAY=2026-01-01 sbatch jobs/schedules/slurm-array.sh
# For one large job over many GPUs use `cluster.slurm` in the job file instead: docker/README.md.
#SBATCH --job-name=classify
#SBATCH --array=0-6%2
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail

lake=${LAKE:?set LAKE to where the data lies, e.g. LAKE=s3://lake}
job=${JOB:-jobs/classify.yaml}
day=$(date -u -d "${FIRST_DAY:?set FIRST_DAY, e.g. 2026-01-01} + ${SLURM_ARRAY_TASK_ID:?start it with sbatch} days" +%F)

# --signal reaches the run itself, two minutes before its time is up: it stages what it holds and ends with 4.
srun batchrun run "$job" --set "input.path=$lake/reviews/day=$day/" --set "output.path=$lake/answers/day=$day/"
code=$?
case $code in
  0 | 3) exit 0 ;; # complete; after 3 the error column says which rows failed
  4) exec scontrol requeue "${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}" ;;
  *) exit "$code" ;; # 1 and 2 want a person
esac

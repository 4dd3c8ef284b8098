"""Store what the first model says to pairs of answers, for DPO without it.

ray job submit --working-dir . -- python -m jobs.store_reference_log_probs --recipe RECIPE --root $PWD
"""

from ray_ds.job import run_stage

if __name__ == "__main__":
    run_stage("reference_log_probs")

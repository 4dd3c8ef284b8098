"""Verify the cluster that this is a job of: is it fit for what this project does, and what must be mended?

ray job submit --working-dir . -- python -m jobs.verify_cluster --run_dir /shared/runs
"""

from ray_ds.job import run_verify

if __name__ == "__main__":
    run_verify()

"""Train the model on TokenShards.

ray job submit --working-dir . -- python -m jobs.train_model --recipe jobs/recipes/demo.toml --root $PWD
"""

from ray_ds.job import run_stage

if __name__ == "__main__":
    run_stage("train")

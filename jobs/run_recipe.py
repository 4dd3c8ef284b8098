"""Run every unfinished step of a recipe in one job.

ray job submit --working-dir . -- python -m jobs.run_recipe --recipe jobs/recipes/demo.toml --root $PWD
"""

from ray_ds.job import run_all

if __name__ == "__main__":
    run_all()

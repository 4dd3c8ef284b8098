"""Take a model's folder in Hugging Face's layout as a Checkpoint.

ray job submit --working-dir . -- python -m jobs.import_model --recipe my_recipe.toml --root $PWD
"""

from ray_ds.job import run_stage

if __name__ == "__main__":
    run_stage("import_hf")

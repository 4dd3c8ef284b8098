"""Serve a model behind an OpenAI-compatible endpoint.

ray job submit --working-dir . -- python -m jobs.serve_model --recipe jobs/recipes/demo.toml --root $PWD
"""

from ray_ds.job import run_stage

if __name__ == "__main__":
    run_stage("serve")

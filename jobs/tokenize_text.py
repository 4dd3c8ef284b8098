"""Turn a Corpus into TokenShards.

ray job submit --working-dir . -- python -m jobs.tokenize_text --recipe jobs/recipes/demo.toml --root $PWD
"""

from ray_ds.job import run_stage

if __name__ == "__main__":
    run_stage("tokenize")

"""Train the tokenizer on a Corpus.

ray job submit --working-dir . -- python -m jobs.train_tokenizer --recipe jobs/recipes/demo.toml --root $PWD
"""

from ray_ds.job import run_stage

if __name__ == "__main__":
    run_stage("tokenizer")

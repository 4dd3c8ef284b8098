"""Turn conversations into token shards, for fine-tuning.

ray job submit --working-dir . -- python -m jobs.tokenize_chat --recipe jobs/recipes/chat.toml --root $PWD
"""

from ray_ds.job import run_stage

if __name__ == "__main__":
    run_stage("tokenize_chat")

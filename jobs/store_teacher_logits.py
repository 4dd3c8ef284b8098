"""Store what a teacher says to the training tokens, for distillation without it.

ray job submit --working-dir . -- python -m jobs.store_teacher_logits --recipe RECIPE --root $PWD
"""

from ray_ds.job import run_stage

if __name__ == "__main__":
    run_stage("teacher_logits")

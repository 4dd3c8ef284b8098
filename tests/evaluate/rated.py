"""Ratings as the page writes them."""

import json
from pathlib import Path
from typing import Any


def answer(model: str, **changes: Any) -> dict[str, Any]:
    whole = {
        "model_id": f"team/{model}",
        "model_digest": f"digest-{model}",
        "endpoint_digest": f"endpoint-{model}",
        "is_chat": True,
        "text": f"answer of {model}",
        "fluency": 4,
        "logic": 3,
        "accuracy": 2,
    }
    return {**whole, **changes}


def rating(**changes: Any) -> dict[str, Any]:
    whole = {
        "rater": "anna",
        "prompt": "Why?",
        "seed": 7,
        "temperature": 0.5,
        "max_tokens": 100,
        "left": answer("a"),
        "right": answer("b"),
        "preferred": "left",
    }
    return {**whole, **changes}


def write_ratings(path: Path, *ratings: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(own) + "\n" for own in ratings))
    return str(path)

"""The command that asks the served model."""

import argparse
import os

from ray_ds.commands.options import AddParser, print_lines
from ray_ds.stage_table import load_object


def add_commands(add: AddParser) -> None:
    """Add generate."""
    generate = add("generate", help="ask the served model")
    generate.add_argument("prompt")
    text = "address of the endpoint (default %(default)s)"
    generate.add_argument("--url", default="http://127.0.0.1:8000", help=text)
    generate.add_argument("--max-tokens", type=int, default=64, help="tokens to generate (default %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    generate.set_defaults(run=_generate)


def _generate(options: argparse.Namespace) -> int:
    answer = load_object("ray_ds.serve.client:generate")(
        options.url,
        options.prompt,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        seed=options.seed,
        api_key=os.environ.get("RAY_DS_API_KEY"),
    )
    return print_lines([answer])

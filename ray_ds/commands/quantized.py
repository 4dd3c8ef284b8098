"""Commands on a QuantizedModel: what is in it, whether it is whole, and what it stands for in floats."""

import argparse
import os

from ray_ds.artifacts import QuantizedModel, open_artifact
from ray_ds.commands.options import AddParser, print_lines
from ray_ds.config.arguments import ArgumentParser
from ray_ds.config.paths import absolute_path
from ray_ds.stage_table import load_object


def add_commands(add: AddParser) -> None:
    """Add quantized, with its actions inspect, verify and dequantize."""
    quantized = add("quantized", help="inspect or verify a QuantizedModel, or write it in floats")
    actions = quantized.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=ArgumentParser)
    inspect = actions.add_parser("inspect", help="show its scheme, sizes, gates and largest errors")
    verify = actions.add_parser("verify", help="check its files, layout and shapes, and this machine's kernels")
    dequantize = actions.add_parser("dequantize", help="write the floats that it stands for, for transformers")
    for action, run in ((inspect, _inspect), (verify, _verify), (dequantize, _dequantize)):
        action.add_argument("artefact", metavar="ARTEFACT", help="its folder")
        action.set_defaults(run=run)
    dequantize.add_argument("--output", required=True, help="folder that is made")
    types = ["bfloat16", "float32"]
    dequantize.add_argument("--dtype", choices=types, default="bfloat16", help="of the weights (default %(default)s)")


def _inspect(options: argparse.Namespace) -> int:
    return print_lines(load_object("ray_ds.quantize.tools:inspect_lines")(_open(options)))


def _verify(options: argparse.Namespace) -> int:
    return print_lines(load_object("ray_ds.quantize.tools:verify_lines")(_open(options)))


def _dequantize(options: argparse.Namespace) -> int:
    target = absolute_path(options.output.rstrip("/"), os.getcwd(), field="--output")
    load_object("ray_ds.quantize.tools:dequantize")(_open(options), target, dtype=options.dtype)
    return print_lines([target])


def _open(options: argparse.Namespace) -> QuantizedModel:
    uri = absolute_path(options.artefact.rstrip("/"), os.getcwd(), field="artefact")
    artifact = open_artifact(uri, [QuantizedModel])
    assert isinstance(artifact, QuantizedModel)
    return artifact

"""Commands on artefacts: where they come from, how good they are, and models in Hugging Face's layout in and out."""

import argparse
import os
from collections.abc import Callable

from ray_ds.artifacts import KINDS, open_artifact
from ray_ds.commands.options import AddParser, print_lines, whole_number
from ray_ds.config.import_hf import MAX_SHARD_BYTES
from ray_ds.config.paths import absolute_path
from ray_ds.errors import ConfigError
from ray_ds.stage_table import load_object


def add_commands(add: AddParser) -> None:
    """Add trace, scores, import and export."""
    trace = add("trace", help="show what an artefact was made from")
    trace.add_argument("artefacts", nargs="+", metavar="ARTEFACT", help="its folder")
    trace.set_defaults(run=_trace)
    scores = add("scores", help="print an EvalReport's scores; with a second one, how it differs")
    scores.add_argument("reports", nargs="+", metavar="REPORT", help="folders of one report or two")
    scores.set_defaults(run=_scores)
    imports = add("import", help="take a model's folder in Hugging Face's layout as a Checkpoint")
    imports.add_argument("layout", choices=["hf"], help="hf: config.json, safetensors, tokenizer.json")
    imports.add_argument("path", help="the folder")
    imports.add_argument("--output", required=True, help="folder below which the artefact is made, as `run_dir` is")
    imports.add_argument("--source", help="where it comes from, for `ray-ds trace`")
    imports.add_argument("--licence", help="its licence, for `ray-ds trace`")
    imports.set_defaults(run=_import)
    export = add("export", help="write a Checkpoint for transformers and vLLM, or ONNX Runtime")
    export.add_argument("artefact", metavar="ARTEFACT", help="its folder")
    layouts = "hf: Hugging Face's layout; onnx: a dense model for ONNX Runtime, in dynamic INT8"
    export.add_argument("--to", required=True, choices=["hf", "onnx"], help=layouts)
    export.add_argument("--output", required=True, help="folder that is made")
    types = ["bfloat16", "float16", "float32"]
    export.add_argument("--dtype", choices=types, help="of the weights (default: as it is)")
    text = "size of a file at most (default %(default)s)"
    export.add_argument("--max-shard-bytes", type=whole_number, default=MAX_SHARD_BYTES, help=text)
    export.set_defaults(run=_export)


def _trace(options: argparse.Namespace) -> int:
    trace: Callable[[str], list[str]] = load_object("ray_ds.report:trace_lines")
    for artefact in options.artefacts:
        print_lines(trace(absolute_path(artefact, os.getcwd(), field="artefact")))
    return 0


def _scores(options: argparse.Namespace) -> int:
    uris = [absolute_path(report, os.getcwd(), field="report") for report in options.reports]
    return print_lines(load_object("ray_ds.evaluate.tables:scores_lines")(uris))


def _import(options: argparse.Namespace) -> int:
    path, output = (
        absolute_path(value.rstrip("/"), os.getcwd(), field=field)
        for value, field in ((options.path, "path"), (options.output, "--output"))
    )
    given = {name: getattr(options, name) for name in ("source", "licence") if getattr(options, name) is not None}
    artifact = load_object("ray_ds.stages.import_hf:import_alone")(path, output, **given)
    # The folder comes last, for scripts: `$(ray-ds import ... | tail -1)`.
    return print_lines(["Name it in the `from` of a step, or give it to `ray-ds export`:", artifact.uri])


def _export(options: argparse.Namespace) -> int:
    uri = absolute_path(options.artefact.rstrip("/"), os.getcwd(), field="artefact")
    artifact = open_artifact(uri, list(KINDS.values()))
    target = absolute_path(options.output.rstrip("/"), os.getcwd(), field="--output")
    if options.to == "onnx":
        for name, value, default in (
            ("--dtype", options.dtype, None),
            ("--max-shard-bytes", options.max_shard_bytes, MAX_SHARD_BYTES),
        ):
            if value != default:
                raise ConfigError(name, value, "has no effect with --to onnx", "leave it out")
        load_object("ray_ds.quantize.onnx_export:export_onnx")(artifact, target)
        return print_lines([target])
    load_object("ray_ds.exchange.export_folder:export_checkpoint")(
        artifact, target, dtype=options.dtype, max_shard_bytes=options.max_shard_bytes
    )
    return print_lines([target])

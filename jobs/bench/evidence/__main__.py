"""Show what takes many seeds or thousands of steps, on one GPU; needs torch and this package, no Ray, no DeepSpeed.

    python -m jobs.bench.evidence shakespeare --corpus ../shared/corpora/books-en.jsonl.gz --output jobs/bench/results

Cases, and their time on one H100 as far as it can be told beforehand; each tells it anew after its first steps:

    shakespeare      2 min  both kinds of attention reach nanoGPT's published loss on tiny Shakespeare
    balance          2 min  moving the routers' biases lowers the experts' maximum load violation
    fp8              4 min  products in FP8 cost no more loss than another seed does
    world_sizes      3 min  numbers of workers are no further apart than permuted micro-batches
    mtp              2 min  multi-token prediction beats pairs of characters and does no harm
    expert_products  1 min  from which width on experts are faster in FP8

Exit status 1 if a case does not show what it is there for. With --small every case runs through in seconds, on a CPU
too, and shows nothing.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from jobs.bench.evidence import balance, expert_products, fp8, mtp, shakespeare, world_sizes
from jobs.bench.evidence.case import Case, Setting
from jobs.bench.evidence.corpus import read_corpus

CASES: Mapping[str, Case] = {
    "shakespeare": shakespeare.run,
    "balance": balance.run,
    "fp8": fp8.run,
    "world_sizes": world_sizes.run,
    "mtp": mtp.run,
    "expert_products": expert_products.run,
}


def main(arguments: Sequence[str]) -> int:
    """Run the cases; print each finding as a line of JSON and keep it as a file."""
    options = parse_options(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus = read_corpus(options.corpus, device)
    setting = Setting(corpus=corpus, device=device, is_small=options.small, steps=options.steps)
    has_shown = True
    for name in options.cases:
        started = time.monotonic()
        finding = CASES[name](setting)
        inputs = {
            "corpus_sha256": corpus.sha256,
            "steps": options.steps,
            "small": options.small,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "seconds": round(time.monotonic() - started, 1),
        }
        report = {"name": f"evidence_{name}", "inputs": inputs, "figures": finding.figures, "claims": finding.claims}
        if options.output is not None:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / f"evidence_{name}.json").write_text(json.dumps(report, indent=1) + "\n")
        for claim, holds in finding.claims.items():
            print(f"{name}: {'shown' if holds else 'NOT shown'}: {claim}", flush=True)
        print(json.dumps(report), flush=True)
        has_shown = has_shown and all(finding.claims.values())
    return 0 if has_shown or options.small else 1


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        prog="jobs.bench.evidence", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--corpus", type=Path, required=True, help=".txt, or jsonl with a row tinyshakespeare")
    parser.add_argument("--output", type=Path, help="folder for a JSON file a case")
    parser.add_argument("--steps", type=int, help="instead of the cases' own")
    parser.add_argument("--small", action="store_true", help="run through in seconds, to see that it runs")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What a replica does before it answers."""

import subprocess
import sys
from pathlib import Path

from jobs.bench.autoscaling.live import make_model
from ray_ds.quantize import quantize_folder


def test_loading_a_model_imports_no_compiler(tmp_path: Path) -> None:
    plain = Path(make_model(tmp_path).path("model"))
    quantize_folder(plain, tmp_path / "int8", max_shard_bytes=10**9)
    code = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from ray_ds.serve.load import load_served_model\n"
        "options = {'device': torch.device('cpu'), 'dtype': torch.float32}\n"
        f"load_served_model(Path({str(plain)!r}), is_quantized=False, **options)\n"
        f"load_served_model(Path({str(tmp_path / 'int8')!r}), is_quantized=True, **options)\n"
        "print([name for name in ('torch._dynamo', 'torch._inductor', 'sympy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]", "their import takes a second of a replica's start"

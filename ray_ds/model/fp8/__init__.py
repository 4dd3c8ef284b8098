"""Training with products in FP8: operands quantized as they come, sums in fp32.

`numbers.py` has the types and how a tensor gets into them, `linear.py` and `experts.py` the layers that multiply in
them, `convert.py` puts these in the place of a model's own. As in DeepSeek-V3 (arXiv 2412.19437, section 3.3.1)
embedding, output projection, router, norms and the products of attention itself stay in higher precision, and so do
master weights and optimizer.
"""

from ray_ds.model.fp8.convert import to_fp8
from ray_ds.model.fp8.experts import Fp8Experts
from ray_ds.model.fp8.linear import Fp8Linear

__all__ = ["Fp8Experts", "Fp8Linear", "to_fp8"]

"""INT8 models: the scheme, the files, the kernels and the layers that use them."""

from ray_ds.quantize.convert import dequantize_state, quantize_folder
from ray_ds.quantize.kernels import SelfTest, self_test
from ray_ds.quantize.layers import Int8Experts, Int8Linear, Int8MLP
from ray_ds.quantize.loading import integer_road, load_quantized

__all__ = [
    "Int8Experts",
    "Int8Linear",
    "Int8MLP",
    "SelfTest",
    "dequantize_state",
    "integer_road",
    "load_quantized",
    "quantize_folder",
    "self_test",
]

"""Quantized models: the schemes, the files, the kernels and the layers that use them."""

from ray_ds.quantize.convert import dequantize_folder, quantize_folder
from ray_ds.quantize.kernels import SelfTest, self_test
from ray_ds.quantize.layers import QuantizedExperts, QuantizedLinear, QuantizedMLP
from ray_ds.quantize.layout import dequantize_state
from ray_ds.quantize.loading import integer_road, load_quantized

__all__ = [
    "QuantizedExperts",
    "QuantizedLinear",
    "QuantizedMLP",
    "SelfTest",
    "dequantize_folder",
    "dequantize_state",
    "integer_road",
    "load_quantized",
    "quantize_folder",
    "self_test",
]

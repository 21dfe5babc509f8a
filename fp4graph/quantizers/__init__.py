"""Better codes in the same formats than rounding to nearest with absmax scales gives."""

from fp4graph.quantizers.calibration import Calibration, matrix_name
from fp4graph.quantizers.distilled import distill
from fp4graph.quantizers.four_over_six import four_over_six
from fp4graph.quantizers.gptq import DAMPING, gptq
from fp4graph.quantizers.hessian import Hessian, output_error
from fp4graph.quantizers.learned import learn
from fp4graph.quantizers.quantize import check_quantizer, is_plain, quantize
from fp4graph.quantizers.quantizer import DATA_FREE, GRIDS, NEED_DATA, RTN, Quantizer
from fp4graph.quantizers.scale_search import scale_search
from fp4graph.quantizers.smoothing import smoothing
from fp4graph.quantizers.together import together
from fp4graph.quantizers.transform import Transform

__all__ = [
    "DAMPING",
    "DATA_FREE",
    "GRIDS",
    "NEED_DATA",
    "RTN",
    "Calibration",
    "Hessian",
    "Quantizer",
    "Transform",
    "check_quantizer",
    "distill",
    "four_over_six",
    "gptq",
    "is_plain",
    "learn",
    "matrix_name",
    "output_error",
    "quantize",
    "scale_search",
    "smoothing",
    "together",
]

"""Better codes in the same formats than rounding to nearest with absmax scales gives."""

from fp4graph.calibrate.calibration import Calibration, matrix_name
from fp4graph.calibrate.four_over_six import four_over_six
from fp4graph.calibrate.gptq import DAMPING, gptq
from fp4graph.calibrate.hessian import Hessian, output_error
from fp4graph.calibrate.learned import learn
from fp4graph.calibrate.quantizer import DATA_FREE, GRIDS, NEED_DATA, Quantizer
from fp4graph.calibrate.rotation import ROTATIONS, rotate
from fp4graph.calibrate.scale_search import scale_search
from fp4graph.calibrate.smoothing import smoothing
from fp4graph.calibrate.transform import Transform

__all__ = [
    "DAMPING",
    "DATA_FREE",
    "GRIDS",
    "NEED_DATA",
    "ROTATIONS",
    "Calibration",
    "Hessian",
    "Quantizer",
    "Transform",
    "four_over_six",
    "gptq",
    "learn",
    "matrix_name",
    "output_error",
    "rotate",
    "scale_search",
    "smoothing",
]

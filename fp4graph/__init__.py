"""FP4 linears for torch.compile, chosen by selector; see README.md."""

from fp4graph.backend import backend
from fp4graph.calibrate import Calibration
from fp4graph.calibrator import calibrate
from fp4graph.errors import (
    CalibrationError,
    CorpusError,
    Fp4GraphError,
    GradientError,
    ModelError,
    OptionError,
    RecompileError,
    RefusalError,
    SelectorError,
    StudyError,
    WeightError,
)
from fp4graph.explain import explain
from fp4graph.formats import (
    MXFP4,
    NVFP4,
    BlockFormat,
    PackedWeight,
    dequantize,
    get_format,
)
from fp4graph.inputs import LinearTap
from fp4graph.kernels import quantize
from fp4graph.policy import Policy, Scheme
from fp4graph.replay import Replay
from fp4graph.report import LinearRow, Report
from fp4graph.selector import Selector
from fp4graph.trace import TracedModel

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "NVFP4",
    "BlockFormat",
    "Calibration",
    "CalibrationError",
    "CorpusError",
    "Fp4GraphError",
    "GradientError",
    "LinearRow",
    "LinearTap",
    "ModelError",
    "OptionError",
    "PackedWeight",
    "Policy",
    "RecompileError",
    "RefusalError",
    "Replay",
    "Report",
    "Scheme",
    "Selector",
    "SelectorError",
    "StudyError",
    "TracedModel",
    "WeightError",
    "__version__",
    "backend",
    "calibrate",
    "dequantize",
    "explain",
    "get_format",
    "quantize",
]

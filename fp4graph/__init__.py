"""FP4 linears for torch.compile, chosen by selector; see README.md."""

from fp4graph.backend import backend
from fp4graph.calibration.calibrate import calibrate
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
from fp4graph.linears.selector import Selector
from fp4graph.policy import Policy
from fp4graph.quantizers import Calibration, quantize
from fp4graph.report import LinearRow, Report
from fp4graph.scheme import Activations, Scheme
from fp4graph.traced.model import TracedModel
from fp4graph.traced.replay import Replay
from fp4graph.traced.tap import LinearTap

__version__ = "0.1.0"

__all__ = [
    "MXFP4",
    "NVFP4",
    "Activations",
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

from . import errors, formats, kernels, models, quantizers, study
from .attention import set_attention
from .budget.find import best_policy
from .calibration.calibrate import calibrate
from .compiler import backend
from .conversion import convert, report_of
from .errors import (
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
from .explanation import explain
from .formats import (
    FP8,
    MXFP4,
    NVFP4,
    BlockFormat,
    PackedWeight,
    dequantize,
    get_format,
)
from .hf_quantizer import FP4Config
from .linears.selector import Selector
from .loading import load
from .policy import Policy
from .quantizers import Calibration, quantize
from .report import LinearRow, Report
from .scheme import Activations, Scheme
from .traced.model import TracedModel
from .traced.replay import Replay
from .traced.streamed import StreamedReplay
from .traced.streamed_tap import StreamedTap
from .traced.tap import LinearTap

__version__: str

__all__ = [
    "FP8",
    "MXFP4",
    "NVFP4",
    "Activations",
    "BlockFormat",
    "Calibration",
    "CalibrationError",
    "CorpusError",
    "FP4Config",
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
    "StreamedReplay",
    "StreamedTap",
    "StudyError",
    "TracedModel",
    "WeightError",
    "__version__",
    "backend",
    "best_policy",
    "calibrate",
    "convert",
    "dequantize",
    "errors",
    "explain",
    "formats",
    "get_format",
    "kernels",
    "load",
    "models",
    "quantize",
    "quantizers",
    "report_of",
    "set_attention",
    "study",
]
